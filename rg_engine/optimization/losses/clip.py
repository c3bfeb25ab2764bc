"""How far a picture is from words, or from other pictures, in the space of a picture-text model (DOODL, sec. 4)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..pixels import WHOLE, Crops, as_pixels, at_least_fp32

#: Pixels (n, 3, size, size) in 0..1 to features (n, D).
Embed = Callable[[Tensor], Tensor]
Over = Literal["mean", "min"]


def spherical_distance(a: Tensor, b: Tensor) -> Tensor:
    """2 asin(|a - b| / 2)^2 of unit vectors: half the square of the angle between them. (..., D) to (...)."""
    a, b = F.normalize(at_least_fp32(a), dim=-1), F.normalize(at_least_fp32(b), dim=-1)
    return 2 * (torch.linalg.vector_norm(a - b, dim=-1) / 2).asin().square()


def mean_feature(features: Tensor) -> Tensor:
    """(n, D) of several pictures to one, (D,): unit vectors, their mean, a unit vector again."""
    return F.normalize(F.normalize(at_least_fp32(features), dim=-1).mean(0), dim=-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipLoss:
    """wanted: features (D,) of a text, or of pictures; or a row for each picture, (B, D). over: what counts of several
    crops; the authors' code takes the smallest distance."""

    embed: Embed
    wanted: Tensor
    crops: Crops = WHOLE
    over: Over = "mean"

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """(B,)."""
        views = self.crops.views(as_pixels(images), generator)
        distances = torch.stack([spherical_distance(self.embed(view), self.wanted.to(view.device)) for view in views])
        return distances.mean(0) if self.over == "mean" else distances.amin(0)
