"""Fits a boundary: labelled pictures go up to each mixing step that is tried, a line is drawn there, and what it does is
measured on pictures kept back."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...boundaries import (
    SOLVERS,
    SPACES,
    STEPS_TRIED,
    Boundary,
    Examples,
    Part,
    Solver,
    Space,
    Tried,
    best_of,
    features_of,
    fit_part,
    held_out,
    in_turn,
    mean_norm,
)  # fmt: skip
from ...boundaries.boundary import PARTS, PartSpace, check_mixing_step
from ...boundaries.solvers import cross_validated
from ...errors import BoundaryError
from .boundary_edit import network_of, prompt_digest
from .boundary_measure import NOISES, Bar, measure, sampled_radii, strip_of
from .crossing import path_of
from .levels import timesteps_up_to
from .passes import Prompts, State, go_up, unguided

AT_ONCE = 16
MOST_MEASURED = 12
STRIP_PICTURES = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitSettings:
    """mixing_step: 0 is the best of those tried; steps: levels from the picture up to it; share of pictures kept back."""

    space: Space = "z"
    mixing_step: int = 0
    steps: int = 40
    solver: str = "svm"
    share: float = 0.2
    refinements: int = 0

    def __post_init__(self) -> None:
        if self.space not in SPACES or self.solver not in SOLVERS:
            raise BoundaryError(f"space {self.space!r}, solver {self.solver!r}: choose among {SPACES} and {tuple(SOLVERS)}")
        if self.mixing_step:
            check_mixing_step(self.mixing_step)
        if self.steps < 2 or not 0 <= self.share <= 0.5:
            raise BoundaryError(
                f"steps are {self.steps} and the share kept back {self.share:g}: give 2 or more, and 0 to 0.5"
            )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Fitted:
    """A boundary, the steps that were tried, and pictures across it: latents, strength by strength, pictures in each."""

    boundary: Boundary
    tried: tuple[Tried, ...]
    strip: Tensor
    strip_pictures: int


def fit_boundary(model: Any, examples: Examples, settings: FitSettings, prompts: Prompts) -> Fitted:
    """Fit a boundary of ``examples`` to the model as it is without readout guidance. Raises BoundaryError before anything is
    computed."""
    model = unguided(model)
    spaces, solver = PARTS[settings.space], SOLVERS[settings.solver]
    path = path_of(model) if "h" in spaces else None
    if settings.space == "region" and examples.masks is None:
        raise BoundaryError("a boundary in a region needs a mask of it in every picture: connect mask")
    everything = torch.arange(len(examples.latents))
    prompts.of(everything, len(everything))
    steps_tried = (settings.mixing_step,) if settings.mixing_step else STEPS_TRIED
    timesteps = sorted({*timesteps_up_to(steps_tried[-1], settings.steps), *steps_tried})
    kept = held_out(examples.labels, settings.share)
    measured = in_turn(kept, examples.labels, MOST_MEASURED)
    chunks = everything.split(AT_ONCE)
    ways_down = sum(sum(t <= step for t in timesteps) for step in steps_tried) if len(measured) else 0
    bar = Bar(len(chunks) * (len(timesteps) - 1) + ways_down)

    states: dict[int, list[State]] = {step: [] for step in steps_tried}
    for chunk in chunks:
        for state in go_up(
            model, examples.latents[chunk], timesteps, prompts.of(chunk, len(everything)), keep=steps_tried, path=path,
            refinements=settings.refinements, callback=bar.step,
        ):  # fmt: skip
            states[state.timestep].append(state)
    one_prompt = prompts.of(torch.zeros(NOISES, dtype=torch.long), len(everything))
    shape = tuple(examples.latents.shape[1:])
    radii = {} if settings.mixing_step else sampled_radii(model, shape, steps_tried, settings.steps, one_prompt)
    found: list[tuple[Tried, Boundary]] = []
    for step in steps_tried:
        state = _joined(states[step])
        fits = {space: _fit(space, state, examples, kept, solver) for space in spaces}
        accuracy: dict[str, float] = {space: right for space, (_, right) in fits.items()}
        boundary = Boundary(
            parts=tuple(part for part, _ in fits.values()), mixing_step=step, steps=sum(t <= step for t in timesteps),
            network=network_of(model), latent_shape=shape, solver=settings.solver,
            pictures=int((~kept).sum()), accuracy=min(accuracy.values()), prompt=prompt_digest(prompts.positive),
        )  # fmt: skip
        tried = Tried(step=step, accuracy=accuracy, norm=mean_norm(state.z), radius=radii.get(step))
        if len(measured):
            flip, change = measure(model, boundary, state, examples, kept, measured, timesteps, prompts, bar)
            tried = dataclasses.replace(tried, flip=flip, change=change)
        found.append((tried, boundary))
    best = best_of([tried for tried, _ in found])
    boundary = next(boundary for tried, boundary in found if tried is best)
    shown = (measured if len(measured) else torch.arange(len(examples.latents)))[:STRIP_PICTURES]
    strip = strip_of(model, boundary, _joined(states[best.step]), examples, shown, timesteps, prompts)
    return Fitted(boundary=boundary, tried=tuple(tried for tried, _ in found), strip=strip, strip_pictures=len(shown))


def _fit(space: PartSpace, state: State, examples: Examples, kept: Tensor, solver: Solver) -> tuple[Part, float]:
    """The part and its accuracy: of pictures kept back, or else of fits that leave a fifth out."""
    value = state.h if space == "h" else state.z
    assert value is not None
    features = features_of(space, value, examples.masks)
    shape = tuple(value.shape[1:2]) if space == "region" else tuple(value.shape[1:])
    learned, labels = ~kept, examples.labels
    part, line = fit_part(space, shape, features[learned], labels[learned], solver)
    if bool(kept.any()):
        return part, line.accuracy(features[kept], labels[kept])
    return part, cross_validated(features, labels, solver)


def _joined(states: Sequence[State]) -> State:
    hidden = [state.h for state in states if state.h is not None]
    return State(
        timestep=states[0].timestep, z=torch.cat([state.z for state in states]), h=torch.cat(hidden) if hidden else None
    )
