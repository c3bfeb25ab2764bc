"""Which networks can be tapped.

A backbone is recognised by its modules, never by a name. To add one, write a function that returns a Backbone or None
and put it into DETECTORS; a transformer is a row in :mod:`.transformers`.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ..errors import BackboneError
from .contract import Backbone
from .transformers import FAMILIES, UNREADABLE, transformer
from .unets import latent_diffusion_unet

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
