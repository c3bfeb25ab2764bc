"""What a boundary does, measured on pictures kept back: flips, change elsewhere, norms, and a strip to look at."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from torch import Tensor

from ...boundaries import Boundary, Examples, features_of, mean_norm
from ...boundaries.boundary import LAST_TIMESTEP, PartSpace
from ...boundaries.solvers import mean_difference
from .crossing import Crossing, directions_of, go_down_across
from .levels import timesteps_up_to
from .passes import Prompts, State, go_down

STRIP_STRENGTHS = (-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5)
NOISES = 4


def measure(
    model: Any, boundary: Boundary, state: State, examples: Examples, kept: Tensor, rows: Tensor, timesteps: Sequence[int],
    prompts: Prompts, bar: Bar,
) -> tuple[float, float]:  # fmt: skip
    """Flip rate and change elsewhere of pictures kept back, each moved to the other class.

    Whether one has flipped is read by another line than the boundary: that between the means of the finished latents of the
    pictures that were learned from. Elsewhere is outside of the mask, or without one at right angles to that line's normal.
    """
    sign = torch.where(examples.labels[rows], -1.0, 1.0).double()
    moved, own = _versions(model, boundary, state, examples, rows, torch.stack([sign, 0 * sign]), timesteps, prompts, bar)
    masks = examples.masks_of(rows)
    space: PartSpace = "region" if boundary.space == "region" else "z"
    clean = features_of(space, examples.latents, examples.masks)
    referee = mean_difference(clean[~kept], examples.labels[~kept])
    after = referee.decide(features_of(space, moved, masks)) > 0
    change = moved - own
    if masks is not None:
        change = change * (1 - masks)
    else:
        axis = (referee.coef / referee.coef.norm()).float()
        change = change.flatten(1) - (change.flatten(1) @ axis)[:, None] * axis
    elsewhere = float(change.square().mean().sqrt() / own.square().mean().sqrt())
    return float((after != examples.labels[rows]).double().mean()), elsewhere


def _versions(
    model: Any, boundary: Boundary, state: State, examples: Examples, rows: Tensor, strengths: Tensor, timesteps:
    Sequence[int], prompts: Prompts, bar: Bar | None = None,
) -> Tensor:  # fmt: skip
    """Finished latents of some pictures, (V, n, C, h, w), moved by strengths (V, n)."""
    versions = len(strengths)
    masks = examples.masks_of(rows)
    h = None if state.h is None else state.h[rows].repeat(versions, *[1] * (state.h.ndim - 1))
    start = State(timestep=state.timestep, z=state.z[rows].repeat(versions, *[1] * (state.z.ndim - 1)), h=h)
    crossing = Crossing(
        boundary=boundary, strength=strengths.flatten(), move="by",
        mask=None if masks is None else masks.repeat(versions, 1, 1, 1), directions=directions_of([boundary])[0],
    )  # fmt: skip
    falling = [t for t in timesteps if t <= boundary.mixing_step][::-1]
    out, _ = go_down_across(
        model, start, falling, [crossing], prompts.of(rows, len(examples.latents)), stale=True,
        callback=None if bar is None else bar.step,
    )  # fmt: skip
    return out.float().cpu().unflatten(0, (versions, -1))


def strip_of(
    model: Any,
    boundary: Boundary,
    state: State,
    examples: Examples,
    rows: Tensor,
    timesteps: Sequence[int],
    prompts: Prompts,
) -> Tensor:
    strengths = torch.tensor(STRIP_STRENGTHS).double()[:, None].expand(-1, len(rows))
    return _versions(model, boundary, state, examples, rows, strengths, timesteps, prompts).flatten(0, 1)


def sampled_radii(
    model: Any, shape: Sequence[int], steps_tried: Sequence[int], steps: int, prompts: Prompts
) -> dict[int, float]:
    """Mean norms of latents on their way from noise, by timestep, as the paper's code prints them."""
    noise = torch.randn((NOISES, *shape), generator=torch.Generator().manual_seed(0))
    levels = round(steps * LAST_TIMESTEP / max(steps_tried))
    return radii_from(model, noise, steps_tried, levels, prompts)


def radii_from(model: Any, noise: Tensor, steps_tried: Sequence[int], levels: int, prompts: Prompts) -> dict[int, float]:
    """Mean norms |z_t| of latents that began as ``noise`` (B, C, h, w), at the timesteps of ``steps_tried``; levels, of the
    whole way."""
    timesteps = sorted({*timesteps_up_to(LAST_TIMESTEP, levels), *steps_tried})
    state, found = State(timestep=LAST_TIMESTEP, z=noise), {}
    for high, low in itertools.pairwise([LAST_TIMESTEP, *sorted(steps_tried, reverse=True)]):
        _, state = go_down(model, state, [t for t in timesteps if low <= t <= high][::-1], prompts)
        found[low] = mean_norm(state.z)
    return found


class Bar:
    """ComfyUI's progress bar, a step a call; an interrupt stops there."""

    def __init__(self, calls: int) -> None:
        self._bar, self._calls, self._done = comfy.utils.ProgressBar(calls), calls, 0

    def step(self, *_: Any) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        self._done += 1
        self._bar.update_absolute(min(self._done, self._calls), self._calls)
