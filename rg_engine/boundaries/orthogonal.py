"""Several attributes at once: each moves at right angles to those before it, as in the paper."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..errors import BoundaryError
from .boundary import Part

LEAST_LEFT = 0.2
SAME = 1 - 1e-6


@dataclasses.dataclass(frozen=True, eq=False)
class Direction:
    """Where a part moves: ``per_unit`` (like its normal) moves a picture by 1 along the part's normal and by 0 along those
    before. kept: the length of what is left of the unit normal, 1 if it was at right angles already."""

    per_unit: Tensor
    kept: float


def orthogonal_directions(parts: list[Part]) -> list[Direction]:
    """The direction of each part, all of one space. Raises BoundaryError if one hardly differs from those before."""
    found: list[Direction] = []
    for number, part in enumerate(parts):
        normal = part.normal.flatten().double()
        same = next((k for k in range(number) if abs(_cosine(part, parts[k])) > SAME), None)
        if not number:
            found.append(Direction(part.normal, 1.0))
            continue
        if same is not None:  # the very boundary again, or its opposite: the moves add up
            found.append(Direction(found[same].per_unit * _cosine(part, parts[same]), found[same].kept))
            continue
        earlier, _ = torch.linalg.qr(torch.stack([p.normal.flatten().double() for p in parts[:number]], 1))
        rest = normal - earlier @ (earlier.T @ normal)
        kept = float(rest.norm() / normal.norm())
        if kept < LEAST_LEFT:
            raise BoundaryError(
                f"boundary {number + 1} of the chain is nearly one of those before it in {part.space}: {kept:.0%} of it "
                "would be left. Take one of them out"
            )
        per_unit = rest * (normal.norm() ** 2 / rest.norm() ** 2)
        found.append(Direction(per_unit.view(part.normal.shape).to(part.normal.dtype), kept))
    return found


def _cosine(one: Part, other: Part) -> float:
    a, b = one.normal.flatten().double(), other.normal.flatten().double()
    return float(a @ b / (a.norm() * b.norm()))
