"""Labelled pictures: labels as people write them, and which pictures are kept back."""

from __future__ import annotations

import dataclasses
import itertools

import torch
from torch import Tensor

from ..errors import BoundaryError

YES, NO = {"1", "+", "true", "yes", "with"}, {"0", "-", "-1", "false", "no", "without"}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Examples:
    """Pictures (N, C, h, w) as latents, labels (N,), True for those with the attribute, masks (N or 1, 1, h, w) of what it
    is about. Raises BoundaryError unless there is something to tell apart."""

    latents: Tensor
    labels: Tensor
    masks: Tensor | None = None

    def __post_init__(self) -> None:
        check_classes(self.labels)
        if not bool(torch.isfinite(self.latents).all()):
            raise BoundaryError("the pictures have values that are not numbers (NaN): look at where they come from")
        if float((self.latents - self.latents[:1]).abs().max()) < 1e-6:
            raise BoundaryError("all pictures are alike: connect pictures with the attribute and others without it")
        if self.masks is not None and not bool((self.masks.flatten(1).sum(1) > 0).all()):
            raise BoundaryError("a mask is empty: every picture needs what the attribute is about painted")

    def masks_of(self, rows: Tensor) -> Tensor | None:
        """Those of some pictures, a mask each."""
        return None if self.masks is None else self.masks.expand(len(self.latents), *self.masks.shape[1:])[rows]


def parse_labels(text: str, pictures: int) -> Tensor:
    """Labels (N,) of a text like "1 0 0 1" or "yes, no". Raises BoundaryError unless there is one a picture."""
    words = text.replace(",", " ").replace(";", " ").lower().split()
    strange = [word for word in words if word not in YES | NO]
    if strange:
        raise BoundaryError(f"label {strange[0]!r} is neither 1 nor 0: give 1 for pictures with the attribute, 0 for others")
    if len(words) != pictures:
        raise BoundaryError(f"there are {len(words)} labels for {pictures} pictures: give one a picture, in their order")
    return torch.tensor([word in YES for word in words], dtype=torch.bool)


def check_classes(labels: Tensor) -> None:
    """Raises BoundaryError where one class is empty."""
    having = int(labels.sum())
    if not 0 < having < len(labels):
        raise BoundaryError(
            f"{having} of {len(labels)} pictures have the attribute: a boundary needs pictures with it and without it"
        )


def held_out(labels: Tensor, share: float) -> Tensor:
    """Which pictures are kept back, (N,): about ``share`` of each class, spread evenly; at least one is learned from."""
    kept = torch.zeros_like(labels)
    for value in (True, False):
        rows = (labels == value).nonzero().flatten()
        count = min(round(share * len(rows)), len(rows) - 1)
        if count > 0:
            kept[rows[((torch.arange(count) + 0.5) * len(rows) / count).long()]] = True
    return kept


def in_turn(kept: Tensor, labels: Tensor, most: int) -> Tensor:
    """Rows of up to ``most`` pictures kept back, of both classes in turn."""
    having, lacking = ((kept & (labels == value)).nonzero().flatten().tolist() for value in (True, False))
    pairs = itertools.zip_longest(having, lacking)
    return torch.tensor([row for pair in pairs for row in pair if row is not None][:most], dtype=torch.long)
