"""Another picture's colours, wherever they are: the sliced Wasserstein distance of pixels."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ..pixels import at_least_fp32
from .likeness import fitted

DIRECTIONS = 12
LONGEST_PX = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class PaletteLoss:
    """picture (n, 3, h, w) in 0..1, a row for each picture or one for all; mask (n, 1, h, w): white where the colours
    should be."""

    picture: Tensor
    mask: Tensor | None = None

    @property
    def pictures(self) -> int:
        """How many it compares with, or masks."""
        return max(len(self.picture), 1 if self.mask is None else len(self.mask))

    def __call__(self, images: Tensor, _generator: torch.Generator | None = None) -> Tensor:
        """(B,): along some directions of colour space, the mean squared difference of sorted pixels."""
        pixels = at_least_fp32(images) / 2 + 0.5
        rows = self.picture.expand(len(pixels), -1, -1, -1)
        masks = None if self.mask is None else fitted(self.mask, pixels) > 0.5
        found = []
        for i, picture in enumerate(pixels):
            inside = picture[:, masks[i, 0]] if masks is not None and masks[i].any() else picture.flatten(1)
            found.append(_sliced(_fewer(inside), _fewer(rows[i].to(pixels).flatten(1))))
        return torch.stack(found)


def _fewer(colours: Tensor) -> Tensor:
    """At most LONGEST_PX^2 of the pixels (3, n), evenly."""
    return colours[:, :: max(1, math.ceil(colours.shape[1] / LONGEST_PX**2))]


def _sliced(a: Tensor, b: Tensor) -> Tensor:
    directions = _directions().to(a)
    a, b = ((directions @ colours).sort(dim=1).values for colours in (a, b))
    if a.shape != b.shape:
        b = F.interpolate(b[None], a.shape[1], mode="linear", align_corners=True)[0]
    return (a - b).square().mean()


def _directions() -> Tensor:
    """Evenly over a half sphere (a Fibonacci lattice), (DIRECTIONS, 3)."""
    k = torch.arange(DIRECTIONS, dtype=torch.float64) + 0.5
    height, turn = k / DIRECTIONS, k * math.pi * (3 - math.sqrt(5))
    flat = (1 - height.square()).sqrt()
    return torch.stack([flat * turn.cos(), flat * turn.sin(), height], 1)
