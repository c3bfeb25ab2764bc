"""UNets of the SD1.5, SD2.x and SDXL family."""

from __future__ import annotations

from typing import Any

from torch import nn

from .contract import Backbone, Tap

_SD_MAPS = (1280,) * 6 + (640,) * 3 + (320,) * 3
_SDXL_MAPS = (1280,) * 3 + (640,) * 3 + (320,) * 3
_FAMILIES = {(768, _SD_MAPS): "SD1.5", (1024, _SD_MAPS): "SD2.x", (2048, _SDXL_MAPS): "SDXL"}
#: Whose maps are of so many channels, for heads that don't say what they were trained on.
FAMILIES_BY_MAPS = {_SD_MAPS: "SD1.5 or SD2.x", _SDXL_MAPS: "SDXL"}


def latent_diffusion_unet(network: nn.Module) -> Backbone | None:
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
    taps = tuple(f"output_blocks.{i}.0.out_layers" for i in range(len(blocks)))
    return Backbone(
        name=_FAMILIES.get((context_width, channels), "a UNet"),
        taps=taps,
        channels=channels,
        emb_tap="time_embed",
        emb_width=int(last.out_features),
        available=tuple(Tap(path=path, channels=width) for path, width in zip(taps, channels, strict=True)),
    )
