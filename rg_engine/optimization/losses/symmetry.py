"""Left and right alike: the authors' demonstration."""

from __future__ import annotations

import torch
from torch import Tensor

from ..pixels import at_least_fp32


def symmetry_loss(images: Tensor, _generator: torch.Generator | None = None) -> Tensor:
    """The mean squared difference of pictures (B, 3, H, W) in -1..1 from their mirror images, (B,)."""
    images = at_least_fp32(images)
    return (images - images.flip(-1)).square().flatten(1).mean(1)
