"""Which networks can be tapped.

A backbone is recognised by its modules, never by a name. To add one, write a function that returns a Backbone or None
and put it into DETECTORS; a transformer is a row in :mod:`.transformers`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from ..errors import BackboneError
from .contract import Backbone, describe_maps
from .transformers import FAMILIES, UNREADABLE, transformer
from .unets import FAMILIES_BY_MAPS, latent_diffusion_unet

DETECTORS: tuple[Callable[[nn.Module], Backbone | None], ...] = (latent_diffusion_unet, transformer)


def detect_backbone(network: nn.Module) -> Backbone:
    """The taps of ``network``. Raises BackboneError if it is none of the known kinds."""
    for detector in DETECTORS:
        backbone = detector(network)
        if backbone is not None:
            return backbone
    name = type(network).__name__
    known = ", ".join(dict.fromkeys(family.name for family in FAMILIES))
    raise BackboneError(
        f"the model is a {name}, which can't be read out{UNREADABLE.get(name, ' yet')}: expected a UNet of the SD1.5, SD2.x "
        f"or SDXL family, or a transformer of {known}. Load such a checkpoint"
    )


def check_head_fits(
    backbone: Backbone, *, head_name: str, trained_on: str, feature_channels: tuple[int, ...], emb_width: int | None,
    taps: Sequence[str] = (),
) -> Backbone:  # fmt: skip
    """The backbone with the taps in use that a head reads: those that it names, or the backbone's own.

    Raises BackboneError, with both shapes in words, if the head was trained on another kind of model. ``emb_width`` is None
    for heads that take no timestep embedding. Transformers of one width are many, so there the name has to agree as well.
    """
    known = {tap.path for tap in backbone.available}
    named = bool(taps) and known.issuperset(taps)
    read = backbone.at(taps) if named else backbone
    emb_differs = emb_width is not None and emb_width != backbone.emb_width
    other = backbone.is_transformer and not (named and trained_on == backbone.name)
    if feature_channels == read.channels and not emb_differs and not other:
        return read
    family = FAMILIES_BY_MAPS.get(feature_channels, "another model" if trained_on == "unknown" else trained_on)
    theirs, ours = (f", emb {width}" if emb_differs else "" for width in (emb_width, backbone.emb_width))
    raise BackboneError(
        f"head {head_name!r} was trained on {family} ({describe_maps(feature_channels)}{theirs}), the model is "
        f"{backbone.name} ({describe_maps(read.channels)}{ours}). Use a head that was trained on this kind of model"
    )
