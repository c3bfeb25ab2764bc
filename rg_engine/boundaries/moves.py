"""How far a strength moves a picture along a boundary's normal. A new way is a function and a line in MOVES."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .boundary import Part


def by_gaps(part: Part, _along: Tensor, strength: Tensor) -> Tensor:
    """By so many times the distance of the two classes' means: 0 leaves the picture, 1 takes a typical one across, and what
    a strength does, its negative undoes."""
    return strength * part.gap


def to_class(part: Part, along: Tensor, strength: Tensor) -> Tensor:
    """To the same place for every picture: 1 and -1 are the two classes' means, 0 is the boundary itself."""
    return part.middle + strength * part.gap / 2 - along


def to_distance(part: Part, along: Tensor, strength: Tensor) -> Tensor:
    """The paper's code: to the distance ``strength`` from the origin along the normal, in the latent's own units."""
    return strength - along


Move = Callable[[Part, Tensor, Tensor], Tensor]
MOVES: dict[str, Move] = {"by": by_gaps, "to": to_class, "distance": to_distance}


def shift_of(move: str, part: Part, along: Tensor, strength: Tensor) -> Tensor:
    """What is added along the normal, (B,), to pictures at ``along`` (B,)."""
    return MOVES[move](part, along, strength.to(along))
