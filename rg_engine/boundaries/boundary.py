"""A boundary: where two kinds of pictures part at one noise level, in one or two spaces.

    z       the whole latent at the network's input scale, (C, h, w)
    region  its channels, averaged inside a mask, (C,): knows no place, so it holds for things that stand anywhere
    h       the network's innermost features, of the last call before the mixing step

A boundary of the space "both" has two parts, z and h, as the paper's.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import BoundaryError
from .solvers import Line, Solver

PartSpace = Literal["z", "region", "h"]
Space = Literal["z", "region", "h", "both"]
SPACES: tuple[Space, ...] = get_args(Space)
PARTS: dict[str, tuple[PartSpace, ...]] = {"z": ("z",), "region": ("region",), "h": ("h",), "both": ("z", "h")}
LAST_TIMESTEP = 999


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """A boundary's normal in one space. middle and gap: of the two classes' means along the normal."""

    space: PartSpace
    normal: Tensor
    middle: float
    gap: float

    def __post_init__(self) -> None:
        if not bool(torch.isfinite(self.normal).all()) or not bool(torch.count_nonzero(self.normal)):
            raise BoundaryError(f"the boundary in {self.space} has a normal that is not finite, or zero: fit it again")
        if not 0 < self.gap < math.inf or not math.isfinite(self.middle):
            raise BoundaryError(
                f"the two kinds lie {self.gap:.3g} apart along the boundary's normal in {self.space}, where one should "
                "be ahead of the other: give more pictures, or another space or solver"
            )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Boundary:
    """Parts; mixing_step, the timestep (of 999) at which they hold; steps, of the inversion from the picture up to there.

    network and latent_shape (C, h, w): of what they were fitted on; solver, pictures, accuracy (of those kept back), prompt
    (a digest): how.
    """

    parts: tuple[Part, ...]
    mixing_step: int
    steps: int
    network: str
    latent_shape: tuple[int, ...]
    solver: str = "svm"
    pictures: int = 0
    accuracy: float = float("nan")
    prompt: str = ""

    def __post_init__(self) -> None:
        check_mixing_step(self.mixing_step)
        if not self.parts:
            raise BoundaryError("the boundary has no parts: fit it again")

    @property
    def space(self) -> str:
        return " and ".join(part.space for part in self.parts)

    def reversed(self) -> Boundary:
        """The boundary of the opposite: what was lacking is had."""
        parts = [dataclasses.replace(part, normal=-part.normal, middle=-part.middle) for part in self.parts]
        return dataclasses.replace(self, parts=tuple(parts))


def check_mixing_step(mixing_step: int) -> None:
    """Raises BoundaryError for a mixing step outside the schedule."""
    if not 1 <= mixing_step < LAST_TIMESTEP:
        raise BoundaryError(
            f"the mixing step {mixing_step} lies outside the schedule: give a timestep from 1 to {LAST_TIMESTEP - 1} (the "
            "paper's is 500), or 0 to search one"
        )


def features_of(space: PartSpace, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """What is told apart, (B, D), of latents or hidden features (B, ...); a region needs its mask (B or 1, 1, h, w)."""
    if space != "region":
        return value.flatten(1)
    if mask is None:
        raise BoundaryError("a boundary of a region needs a mask of it: connect mask")
    weights = mask.expand(len(value), 1, *value.shape[-2:]).to(value)
    return (value * weights).flatten(2).sum(2) / weights.flatten(2).sum(2).clamp_min(1e-6)


def fit_part(
    space: PartSpace, shape: tuple[int, ...], features: Tensor, labels: Tensor, solver: Solver
) -> tuple[Part, Line]:
    """The part that a solver's line makes of features (N, D), labels (N,), True for the class that strength leads to."""
    line = solver(features, labels)
    normal = (line.coef / line.coef.norm()).float()
    along = features.double() @ normal.double()
    having, lacking = float(along[labels].mean()), float(along[~labels].mean())
    part = Part(space=space, normal=normal.view(shape), middle=(having + lacking) / 2, gap=having - lacking)
    return part, line


def coordinate(part: Part, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """<x, n> of each row, (B,)."""
    return features_of(part.space, value, mask).double() @ part.normal.flatten().double().to(value.device)


def shifted(space: PartSpace, value: Tensor, normal: Tensor, shift: Tensor, mask: Tensor | None = None) -> Tensor:
    """x + shift n, the paper's move, shift (B,); with a mask, inside of it only."""
    direction = normal.to(value).view(1, *normal.shape, *([1] * (value.ndim - 1 - normal.ndim)))
    move = shift.to(value).view(-1, *([1] * (value.ndim - 1))) * direction
    return value + (move if mask is None or space == "h" else move * mask.to(value))
