"""Labelled pictures: labels as people write them, and which pictures are kept back."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import BoundaryError

YES, NO = {"1", "+", "true", "yes", "with"}, {"0", "-", "-1", "false", "no", "without"}


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
    """Which pictures are kept back, (N,): about ``share`` of each class, spread evenly, leaving at least one to learn from."""
    kept = torch.zeros_like(labels)
    for value in (True, False):
        rows = (labels == value).nonzero().flatten()
        count = min(round(share * len(rows)), len(rows) - 1)
        if count > 0:
            kept[rows[((torch.arange(count) + 0.5) * len(rows) / count).long()]] = True
    return kept
