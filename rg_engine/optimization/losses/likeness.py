"""Another picture's pixels, or its edges, within a mask."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional as F

from ..pixels import at_least_fp32

SOBEL = ((-1.0, 0.0, 1.0), (-2.0, 0.0, 2.0), (-1.0, 0.0, 1.0))


def fitted(maps: Tensor, like: Tensor) -> Tensor:
    """Pictures or masks (n, C, h, w) at the size and for the batch of ``like``."""
    if maps.shape[-2:] != like.shape[-2:]:  # before it is moved: Apple's GPUs know no antialiasing
        maps = F.interpolate(maps.to(like.dtype), like.shape[-2:], mode="bilinear", antialias=True)
    return maps.to(like).expand(len(like), -1, -1, -1)


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of values (B, C, H, W) where the mask (B or 1, 1, h, w) in 0..1 is white, (B,)."""
    if mask is None:
        return values.flatten(1).mean(1)
    weights = fitted(mask, values).expand_as(values)
    return (values * weights).flatten(1).sum(1) / weights.flatten(1).sum(1).clamp(min=1e-6)


def edges(pixels: Tensor) -> Tensor:
    """How fast brightness changes, (B, 1, H, W), by Sobel's filters."""
    kernel = torch.tensor(SOBEL, dtype=pixels.dtype, device=pixels.device) / 8
    both = torch.stack([kernel, kernel.T])[:, None]
    changes = F.conv2d(F.pad(pixels.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate"), both)
    return (changes.square().sum(1, keepdim=True) + 1e-6).sqrt()


@dataclasses.dataclass(frozen=True, kw_only=True)
class LikenessLoss:
    """picture (n, 3, h, w) in 0..1; mask (n, 1, h, w), white where it counts; of edges only: ``by_edges``."""

    picture: Tensor
    mask: Tensor | None = None
    by_edges: bool = False

    @property
    def pictures(self) -> int:
        """How many it compares with, or masks."""
        return max(len(self.picture), 1 if self.mask is None else len(self.mask))

    def __call__(self, images: Tensor, _generator: torch.Generator | None = None) -> Tensor:
        """The mean squared difference of pixels in 0..1, (B,)."""
        pixels = at_least_fp32(images) / 2 + 0.5  # not cut off: outside of 0..1 the gradient leads back
        wanted = fitted(self.picture, pixels)
        difference = edges(pixels) - edges(wanted) if self.by_edges else pixels - wanted
        return masked_mean(difference.square(), self.mask)
