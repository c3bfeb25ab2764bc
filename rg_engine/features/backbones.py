"""Which networks can be tapped, and where.

A backbone is recognised by its modules, never by a name. To add one, write a function that returns a Backbone or None
and put it into DETECTORS.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import groupby
from typing import Any

from torch import nn

from ..errors import BackboneError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Backbone:
    """A network's taps: paths of the modules whose outputs are the features, and of the one that gives emb."""

    name: str
    taps: tuple[str, ...]
    channels: tuple[int, ...]
    emb_tap: str
    emb_width: int

    def describe(self) -> str:
        return f"{self.name} ({describe_maps(self.channels)})"


def detect_backbone(network: nn.Module) -> Backbone:
    """The taps of ``network``. Raises BackboneError if it is none of the known kinds."""
    for detector in DETECTORS:
        backbone = detector(network)
        if backbone is not None:
            return backbone
    raise BackboneError(
        f"the model is a {type(network).__name__}, which can't be read out yet: expected a UNet of the SD1.5, SD2.x or "
        "SDXL family. Load such a checkpoint"
    )


def check_head_fits(
    backbone: Backbone, *, head_name: str, trained_on: str, feature_channels: tuple[int, ...], emb_width: int | None
) -> None:
    """Raises BackboneError, with both shapes in words, if a head was trained on another kind of model.

    ``emb_width`` is None for heads that take no timestep embedding.
    """
    emb_differs = emb_width is not None and emb_width != backbone.emb_width
    if feature_channels == backbone.channels and not emb_differs:
        return
    family = _FAMILIES_BY_MAPS.get(feature_channels, "another model" if trained_on == "unknown" else trained_on)
    theirs = f", emb {emb_width}" if emb_differs else ""
    ours = f", emb {backbone.emb_width}" if emb_differs else ""
    raise BackboneError(
        f"head {head_name!r} was trained on {family} ({describe_maps(feature_channels)}{theirs}), the model is "
        f"{backbone.name} ({describe_maps(backbone.channels)}{ours}). Use a head that was trained on this kind of model"
    )


def describe_maps(channels: tuple[int, ...]) -> str:
    """'9 maps: 3x1280, 3x640, 3x320'."""
    runs = [(value, len(list(run))) for value, run in groupby(channels)]
    return f"{len(channels)} maps: " + ", ".join(f"{count}x{value}" if count > 1 else str(value) for value, count in runs)


def _latent_diffusion_unet(network: nn.Module) -> Backbone | None:
    """SD's UNet: the output blocks' residual branches, before the skip is added; emb before the label embedding."""
    found, embedding = getattr(network, "output_blocks", None), getattr(network, "time_embed", None)
    if not isinstance(found, nn.ModuleList) or not isinstance(embedding, nn.Sequential):
        return None
    blocks: list[Any] = list(found)
    branches: list[Any] = [getattr(block[0], "out_layers", None) for block in blocks]
    if not all(isinstance(branch, nn.Sequential) for branch in branches):
        return None
    channels = tuple(int(branch[-1].out_channels) for branch in branches)
    cross_attention: Any = next((m for name, m in network.named_modules() if name.endswith("attn2")), None)
    context_width = 0 if cross_attention is None else int(cross_attention.to_k.in_features)
    last: Any = embedding[-1]
    family = _FAMILIES.get((context_width, channels), "a UNet")
    return Backbone(
        name=family,
        taps=tuple(f"output_blocks.{i}.0.out_layers" for i in range(len(blocks))),
        channels=channels,
        emb_tap="time_embed",
        emb_width=int(last.out_features),
    )


_SD_MAPS = (1280,) * 6 + (640,) * 3 + (320,) * 3
_SDXL_MAPS = (1280,) * 3 + (640,) * 3 + (320,) * 3
_FAMILIES = {(768, _SD_MAPS): "SD1.5", (1024, _SD_MAPS): "SD2.x", (2048, _SDXL_MAPS): "SDXL"}
_FAMILIES_BY_MAPS = {_SD_MAPS: "SD1.5 or SD2.x", _SDXL_MAPS: "SDXL"}

DETECTORS: tuple[Callable[[nn.Module], Backbone | None], ...] = (_latent_diffusion_unet,)
