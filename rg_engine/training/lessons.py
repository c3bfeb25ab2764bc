"""What each kind of head learns from: how many pictures an example has, what is true about them, and the loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

from torch import Tensor

from ..types import HeadKind
from .losses import balanced_mse, region_hinge, track_contrast, triplet_hinge

#: maps: (N, D, h, w) beside the picture; tracks: (N, P, 2, 2), see :func:`track_contrast`; regions: (N, pictures, h, w),
#: where to look, or nothing, since the order of the pictures says it all
Truth = Literal["maps", "tracks", "regions"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lesson:
    """pictures: of an example. loss(readouts (N, pictures, D, h, w), truth or None) -> (N,)."""

    pictures: int
    truth: Truth
    loss: Callable[[Tensor, Tensor], Tensor]


def lesson_of(kind: HeadKind, *, background: float | None = None, temperature: float = 0.07, margin: float = 0.5) -> Lesson:
    """The lesson of a kind of head.

    background: the empty value of a sparse control (spatial, keypoint), None for dense ones; temperature: of the
    contrastive loss (correspondence); margin: of the hinge (appearance).
    """

    def compare_maps(readouts: Tensor, truth: Tensor) -> Tensor:
        return balanced_mse(readouts[:, 0], truth, background=background)

    def tell_apart(readouts: Tensor, regions: Tensor | None) -> Tensor:
        whole = triplet_hinge(readouts, margin)
        return whole if regions is None else (whole + region_hinge(readouts, regions, margin)) / 2

    match kind:
        case "spatial" | "keypoint":
            return Lesson(pictures=1, truth="maps", loss=compare_maps)
        case "lgp":
            return Lesson(pictures=1, truth="maps", loss=lambda readouts, truth: balanced_mse(readouts[:, 0], truth))
        case "correspondence":
            return Lesson(pictures=2, truth="tracks", loss=lambda r, tracks: track_contrast(r, tracks, temperature))
        case "appearance":
            return Lesson(pictures=3, truth="regions", loss=tell_apart)
