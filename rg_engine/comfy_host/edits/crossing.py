"""Pictures on their way down that are moved across boundaries where these hold."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...boundaries import Boundary, Direction, Part, coordinate, orthogonal_directions, shift_of, shifted
from ...errors import BackboneError, BoundaryError
from ..loaded.model import backbone_of
from .hidden import Hidden, hidden_path
from .passes import Callback, Prompts, SharedNoise, State, go_down


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Crossing:
    """A boundary and how far each picture is moved: strength (B,), in the units of ``move``; mask (B or 1, 1, h, w).

    directions: one a part, at right angles to the crossings before.
    """

    boundary: Boundary
    strength: Tensor
    move: str
    mask: Tensor | None
    directions: tuple[Direction, ...]

    @property
    def moves(self) -> Tensor:
        """Which pictures it moves, (B,): a strength of 0 leaves one as it is, unless 0 is a place to go to."""
        return (self.strength != 0) | (self.move != "by")


def directions_of(boundaries: Sequence[Boundary]) -> list[tuple[Direction, ...]]:
    """Of each boundary's parts, at right angles to those before it. Raises BoundaryError where hardly anything is left."""
    found: list[list[Direction]] = [[] for _ in boundaries]
    for space in dict.fromkeys(part.space for boundary in boundaries for part in boundary.parts):
        owners = [(k, part) for k, boundary in enumerate(boundaries) for part in boundary.parts if part.space == space]
        for (k, _), direction in zip(owners, orthogonal_directions([part for _, part in owners]), strict=True):
            found[k].append(direction)
    return [tuple(each) for each in found]


def go_down_across(
    model: Any, state: State, timesteps: Sequence[int], crossings: Sequence[Crossing], prompts: Prompts, *, eta: float = 0.0,
    noise: SharedNoise | None = None, stale: bool = False, callback: Callback | None = None,
) -> tuple[Tensor, State]:  # fmt: skip
    """Finished latents (B, C, h, w) of a state, sampled along falling timesteps to 0, moved at each boundary's mixing step;
    and the state just after the first moves.

    stale: h is handed on as the paper's code does (see :mod:`.hidden`).
    """
    stops = sorted({each.boundary.mixing_step for each in crossings} | {timesteps[0], timesteps[-1]}, reverse=True)
    read = any(part.space == "h" and bool(each.moves.any()) for each in crossings for part in each.boundary.parts)
    hidden = Hidden(path_of(model), stale=stale) if read else None
    done, total = 0, len(timesteps)
    samples, first = state.z, None
    for high, low in itertools.pairwise(stops):
        state = _moved(state, [each for each in crossings if each.boundary.mixing_step == high], hidden)
        first = first or state
        part = [t for t in timesteps if low <= t <= high]
        samples, state = go_down(
            model, state, part, prompts, eta=eta, noise=noise, hidden=hidden, callback=_offset(callback, done, total)
        )
        done += len(part) - 1
    return samples, first or state


def path_of(model: Any) -> str:
    """The module whose output is h. Raises BoundaryError for a network that is not known inside."""
    try:
        return hidden_path(model.get_model_object("diffusion_model"), backbone_of(model))
    except BackboneError as error:
        raise BoundaryError(f"there is no h to read: {error}, or choose space z or region") from error


def _moved(state: State, crossings: Sequence[Crossing], hidden: Hidden | None) -> State:
    z, h = state.z, state.h
    put = torch.zeros(len(z), dtype=torch.bool)
    for each in crossings:
        for part, direction in zip(each.boundary.parts, each.directions, strict=True):
            if part.space != "h":
                z = _across(part, direction, z, each)
            elif hidden is not None and bool(each.moves.any()):
                assert h is not None
                h = torch.where(each.moves.view(-1, *([1] * (h.ndim - 1))), _across(part, direction, h, each), h)
                put |= each.moves
    if bool(put.any()):
        assert hidden is not None
        assert h is not None
        hidden.put(h, put)
    return State(timestep=state.timestep, z=z, h=h)


def _across(part: Part, direction: Direction, value: Tensor, crossing: Crossing) -> Tensor:
    shift = shift_of(crossing.move, part, coordinate(part, value, crossing.mask), crossing.strength)
    return shifted(part.space, value, direction.per_unit, shift, crossing.mask)


def _offset(callback: Callback | None, done: int, total: int) -> Callback | None:
    if callback is None:
        return None
    return lambda step, denoised, x, _total: callback(done + step, denoised, x, total)
