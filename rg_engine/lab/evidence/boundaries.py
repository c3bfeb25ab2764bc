"""``evaluate boundaries``: flips, change elsewhere and identity of unseen pictures, measured on finished pixels."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...boundaries import SOLVERS, STEPS_TRIED, Boundary, Examples, Part, features_of, fit_part
from ...boundaries.boundary import PARTS
from ...comfy_host.edits.boundary_edit import network_of
from ...comfy_host.edits.boundary_fit import FitSettings, fit_boundary
from ...comfy_host.edits.crossing import Crossing, directions_of, go_down_across, path_of
from ...comfy_host.edits.levels import timesteps_up_to
from ...comfy_host.edits.passes import Prompts, State, go_down, go_up
from ...guidance.targets import fit
from ..demo_world import World, encoded
from .boundary_attributes import ATTRIBUTES, Attribute, Pair, change_elsewhere, is_flipped, sample_pairs, where_they_differ
from .edits import colour_distance

LEARNED, SEED, LEVELS, AT_ONCE = 60, 8101, 30, 32
MOST_LEARNED = 100
COUNTS = (4, 10, 20, 100)
COUNTED = ("bright wall", "red shirt, anywhere")
IN_OTHER_SPACES = "red shirt, in one place"
#: The strengths of each edit, in the classes' distances; the last is further than Boundary Edit's slider goes.
STRENGTHS = (1.0, 1.5, 2.0, 4.0)
PAPERS_STEP, RIVAL_CFG = 500, 3.0


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Ready:
    """Pictures of an attribute at each step that is tried: the first ``learned`` are learned from, the others measured."""

    attribute: Attribute
    pairs: list[Pair]
    learned: int
    latents: Tensor
    labels: Tensor
    masks: Tensor
    timesteps: list[int]
    states: dict[int, State]


def boundaries_table(world: World) -> list[dict[str, Any]]:
    """Of each attribute: a row a mixing step, the automatic one, other spaces, fewer pictures, and the same edit by prompt.

    flips: share of pictures nearer to their scene with the other value, after moves of STRENGTHS.
    elsewhere: mean difference of pixels outside of what should change. identity: how far the figure's colours are from what
    they should be. accuracy: of the boundary, on these pictures.
    """
    rows: list[dict[str, Any]] = []
    for attribute in ATTRIBUTES:
        ready = make_ready(world, attribute)
        for step in STEPS_TRIED:
            rows.append(_row(world, ready, attribute.space, step))
        rows.append({**_chosen(world, ready, rows[-len(STEPS_TRIED) :])})
        if attribute.name == IN_OTHER_SPACES:
            rows += [_row(world, ready, space, PAPERS_STEP) for space in ("h", "both", "region")]
        if attribute.name in COUNTED:
            rows += [_row(world, ready, attribute.space, PAPERS_STEP, count) for count in COUNTS]
        if attribute.worded:
            rows.append(_by_prompt(world, ready))
        print(f"boundaries: {attribute.name} measured", flush=True)
    return rows


def make_ready(world: World, attribute: Attribute) -> Ready:
    learned = MOST_LEARNED if attribute.name in COUNTED else LEARNED
    pairs = sample_pairs(attribute, learned + world.pictures, SEED)
    pictures = torch.stack([pair.pictures()[0] for pair in pairs])
    masks = torch.stack([where_they_differ(*pair.pictures()) for pair in pairs])[:, None]
    latents = world.vae.encode(pictures).float().cpu().clone()
    timesteps = sorted({*timesteps_up_to(max(STEPS_TRIED), LEVELS), *STEPS_TRIED})
    path = path_of(world.model)
    parts = [
        go_up(world.model, part, timesteps, empty(world), keep=STEPS_TRIED, path=path) for part in latents.split(AT_ONCE)
    ]
    states = {}
    for states_of_step in zip(*parts, strict=True):
        h = torch.cat([state.h for state in states_of_step if state.h is not None])
        z = torch.cat([state.z for state in states_of_step])
        states[states_of_step[0].timestep] = State(timestep=states_of_step[0].timestep, z=z, h=h)
    return Ready(
        attribute=attribute, pairs=pairs, learned=learned, latents=latents,
        labels=torch.tensor([pair.value for pair in pairs]), masks=fit(masks, (latents.shape[-2], latents.shape[-1])),
        timesteps=timesteps, states=states,
    )  # fmt: skip


def empty(world: World) -> Prompts:
    return Prompts(positive=encoded(world.clip, [""]))


def _row(world: World, ready: Ready, space: str, step: int, count: int = LEARNED) -> dict[str, Any]:
    boundary = _fitted(world, ready, space, step, count)
    tested = slice(ready.learned, None)
    state, labels, masks = ready.states[step], ready.labels[tested], ready.masks[tested]
    sign = torch.where(labels, -1.0, 1.0).double()
    z = state.z[tested]
    h = None if state.h is None else state.h[tested]
    start = State(timestep=step, z=z, h=h)
    versions = [_down(world, ready, boundary, start, amount * sign, masks) for amount in (0.0, *STRENGTHS)]
    untouched, *edited = (world.vae.decode(latents).clamp(0, 1).cpu() for latents in versions)
    found = [_scores(world, ready.pairs[tested], each, untouched) for each in edited]
    return {
        "attribute": ready.attribute.name, "space": space, "step": step, "pictures": count,
        "accuracy": round(boundary.accuracy, 3),
        **{f"{name} at {amount:g}": value for amount, scores in zip(STRENGTHS, found, strict=True)
           for name, value in scores.items()},
    }  # fmt: skip


def _fitted(world: World, ready: Ready, space: str, step: int, count: int) -> Boundary:
    """The engine's fit at one step, without another inversion."""
    state, tested = ready.states[step], slice(ready.learned, None)
    parts: list[Part] = []
    accuracy = []
    for part_space in PARTS[space]:
        value = state.h if part_space == "h" else state.z
        assert value is not None
        features = features_of(part_space, value, ready.masks)
        shape = tuple(value.shape[1:2]) if part_space == "region" else tuple(value.shape[1:])
        part, line = fit_part(part_space, shape, features[:count], ready.labels[:count], SOLVERS["svm"])
        parts.append(part)
        accuracy.append(line.accuracy(features[tested], ready.labels[tested]))
    return Boundary(
        parts=tuple(parts), mixing_step=step, steps=LEVELS, network=network_of(world.model),
        latent_shape=tuple(ready.latents.shape[1:]), accuracy=min(accuracy), pictures=count,
    )  # fmt: skip


def _down(world: World, ready: Ready, boundary: Boundary, state: State, strength: Tensor, masks: Tensor) -> Tensor:
    crossing = Crossing(
        boundary=boundary, strength=strength, move="by", mask=masks if boundary.space == "region" else None,
        directions=directions_of([boundary])[0],
    )  # fmt: skip
    falling = [t for t in ready.timesteps if t <= state.timestep][::-1]
    return go_down_across(world.model, state, falling, [crossing], empty(world), stale=True)[0]


def _scores(world: World, pairs: list[Pair], edited: Tensor, untouched: Tensor) -> dict[str, float]:
    each = list(zip(edited, untouched, pairs, strict=True))
    return {
        "flips": round(float(np.mean([is_flipped(picture, pair) for picture, _, pair in each])), 3),
        "elsewhere": round(float(np.mean([change_elsewhere(*one) for one in each])), 4),
        "identity": round(
            float(np.mean([colour_distance(world, picture[None], pair.other) for picture, _, pair in each])), 3
        ),
    }


def _chosen(world: World, ready: Ready, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The automatic step of Fit Boundary, and what was measured there."""
    learned = slice(0, LEARNED)
    examples = Examples(
        latents=ready.latents[learned], labels=ready.labels[learned],
        masks=ready.masks[learned] if ready.attribute.space == "region" else None,
    )  # fmt: skip
    settings = FitSettings(space=ready.attribute.space, steps=LEVELS)  # type: ignore[arg-type]
    step = fit_boundary(world.model, examples, settings, empty(world)).boundary.mixing_step
    return {**next(row for row in rows if row["step"] == step), "step": f"auto: {step}"}


def _by_prompt(world: World, ready: Ready) -> dict[str, Any]:
    """The same edit with words: up with each picture's own caption, down with the other's."""
    pairs, latents = ready.pairs[ready.learned :], ready.latents[ready.learned :]
    own, other = (
        encoded(world.clip, [scene.caption() for scene in scenes])
        for scenes in ([pair.scene for pair in pairs], [pair.other for pair in pairs])
    )
    timesteps = [t for t in ready.timesteps if t <= PAPERS_STEP]
    (state,) = go_up(world.model, latents, timesteps, Prompts(positive=own), keep=[PAPERS_STEP])
    told = Prompts(positive=other, negative=encoded(world.clip, [""]), cfg=RIVAL_CFG)
    versions = [go_down(world.model, state, timesteps[::-1], prompts)[0] for prompts in (Prompts(positive=own), told)]
    untouched, edited = (world.vae.decode(each).clamp(0, 1).cpu() for each in versions)
    scores = _scores(world, pairs, edited, untouched)
    return {
        "attribute": ready.attribute.name, "space": f"prompt, cfg {RIVAL_CFG:g}", "step": PAPERS_STEP,
        **{f"{name} at 1": value for name, value in scores.items()},
    }  # fmt: skip
