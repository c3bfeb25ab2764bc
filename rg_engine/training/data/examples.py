"""Training examples in memory: clean latents, which of them belong together, and what is true about them."""

from __future__ import annotations

import copy
import dataclasses

import torch
from torch import Tensor

from ...errors import TrainingError
from ...types import HeadKind
from ..lessons import lesson_of

#: What each kind wants, in words.
EXPECTED = {
    "maps": "one map for each picture, (N, D, h, w)",
    "tracks": "point tracks (N, P, 2, 2) for each pair of pictures: [point, picture, (x, y)], fractions of the picture",
    "regions": "a mask for each picture, or nothing: the pictures are triplets in a row (anchor, the same identity "
    "elsewhere, another identity)",
}
FEWEST = 4


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Examples:
    """latents (M, C, h, w), as the VAE gives them; groups (N, K), the pictures of each example; truth (N, ...).

    Latents and truth are on the CPU. A picture's row is also its prompt's, where prompts differ. Raises TrainingError for
    what can't be learned from: too few examples, sizes that differ, values that are not finite, tracks outside the picture.
    """

    kind: HeadKind
    latents: Tensor
    truth: Tensor | None
    groups: Tensor

    def __post_init__(self) -> None:
        lesson = lesson_of(self.kind)
        if self.latents.ndim != 4 or 0 in self.latents.shape[1:]:
            raise TrainingError(f"latents have shape {tuple(self.latents.shape)}: expected pictures' latents, (M, C, h, w)")
        if self.groups.ndim != 2 or self.groups.shape[1] != lesson.pictures:
            raise TrainingError(
                f"the examples of a {self.kind} head have {lesson.pictures} pictures each, not "
                f"{tuple(self.groups.shape)[1:]}"
            )
        if not torch.isfinite(self.latents).all():
            raise TrainingError("the latents hold NaN or infinite values: look at the node or the VAE that made them")
        if self.truth is None:
            if lesson.truth == "regions":
                return
            raise TrainingError(f"a {self.kind} head needs targets: {EXPECTED[lesson.truth]}")
        if len(self.truth) != len(self.groups) or self.truth.ndim != 4:
            raise TrainingError(
                f"targets have shape {tuple(self.truth.shape)} for {len(self.groups)} examples of a {self.kind} head: "
                f"expected {EXPECTED[lesson.truth]}"
            )
        if lesson.truth == "tracks":
            _check_tracks(self.truth)
        elif self.truth.shape[-2:] != self.latents.shape[-2:]:
            raise TrainingError(
                f"targets are {_by(self.truth)} cells and the latents {_by(self.latents)}: they must be of one size"
            )
        elif lesson.truth == "regions" and self.truth.shape[1] != lesson.pictures:
            raise TrainingError(
                f"there are {self.truth.shape[1]} masks for the {lesson.pictures} pictures of each example: give "
                "one a picture"
            )
        elif not torch.isfinite(self.truth).all():
            raise TrainingError("the targets hold NaN or infinite values: look at the node that made them")

    def __len__(self) -> int:
        return len(self.groups)

    @property
    def cells(self) -> tuple[int, int]:
        return self.latents.shape[-2], self.latents.shape[-1]

    def check_enough(self) -> None:
        """Raises TrainingError if there are too few to learn from."""
        if len(self) < FEWEST:
            raise TrainingError(
                f"{len(self)} examples are too few to train a {self.kind} head: give {FEWEST} or more (100 are a good start)"
            )

    def part(self, rows: Tensor) -> Examples:
        """The examples of ``rows``."""
        some = copy.copy(self)  # without the checks: a part may be all padding
        object.__setattr__(some, "groups", self.groups[rows])
        object.__setattr__(some, "truth", None if self.truth is None else self.truth[rows])
        return some

    def split(self, share: float) -> tuple[Examples, Examples | None]:
        """Examples to learn from and, evenly spread among all, ``share`` of them to validate with (None if share is 0)."""
        self.check_enough()
        count = round(share * len(self))
        if share <= 0:
            return self, None
        kept_back = torch.zeros(len(self), dtype=torch.bool)
        kept_back[torch.linspace(0, len(self) - 1, max(count, 1)).round().long()] = True
        everything = torch.arange(len(self))
        return self.part(everything[~kept_back]), self.part(everything[kept_back])


def in_a_row(kind: HeadKind, latents: Tensor, truth: Tensor | None) -> Examples:
    """Examples whose pictures follow each other: one by one, in pairs or in triplets, as the kind needs them."""
    pictures = lesson_of(kind).pictures
    if len(latents) % pictures:
        raise TrainingError(
            f"a {kind} head learns from {'pairs' if pictures == 2 else 'triplets'} of pictures in a row, and "
            f"{len(latents)} pictures can't be divided by {pictures}"
        )
    return Examples(kind=kind, latents=latents, truth=truth, groups=torch.arange(len(latents)).view(-1, pictures))


def _check_tracks(tracks: Tensor) -> None:
    if tracks.shape[2:] != (2, 2):
        raise TrainingError(f"tracks have shape {tuple(tracks.shape)}: expected {EXPECTED['tracks']}")
    given = tracks[~tracks.isnan().flatten(2).any(2)]  # (n, 2, 2)
    if not len(given):
        raise TrainingError("there is no point in any of the tracks: every row is NaN, which is padding")
    if not torch.isfinite(given).all() or given.min() < 0 or given.max() > 1:
        raise TrainingError(
            f"tracks go from {given.min():g} to {given.max():g}, outside the picture: x and y are fractions of its "
            "width and height, between 0 and 1. Leave out points that are not seen"
        )


def _by(maps: Tensor) -> str:
    return f"{maps.shape[-1]}x{maps.shape[-2]}"
