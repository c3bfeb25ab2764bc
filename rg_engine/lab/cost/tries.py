"""Ways to get more control out of each backward pass, tried beside fast mode on the demo model: ``benchmark --tries``.

What won is in the engine (``feature_steps`` and ``keep_negative`` of the settings); the others live here only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...comfy_host.guided import step
from ...demo.seen import look
from ...demo.wording import read_caption
from ...guidance import GuidanceSettings, Target
from ...guidance.pictures import spread
from ..demo_heads import demo_recipe
from ..demo_world import World, demo_head
from ..steering import STEPS, Way, scene_scores, scene_target, steer
from .frontier import GRADIENT_ALONE, HEADS
from .models import SHAPES
from .operations import Counts, count

KEY = "tries"
SEEN = ("figure's colour", "wall")
#: Direction (B, C, H, W) of one run's move, of its gradient and the directions of its moves before.
Direction = Callable[[Tensor, list[Tensor]], Tensor]
#: What the length of a move is multiplied with, (B, 1, 1, 1) or a number, of run, percent, gradient and length.
Length = Callable[[Any, float, Tensor, Any], Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Try:
    """settings (none: unguided) and the targets' end; direction and length change each move."""

    settings: GuidanceSettings | None = GRADIENT_ALONE
    end_percent: float = 0.5
    steps: int = STEPS
    direction: Direction | None = None
    length: Length | None = None


def momentum(share: float) -> Direction:
    """Heavy ball: each direction goes on with a share of the one before."""
    return lambda gradient, before: _unit(gradient) + share * (before[-1] if before else 0.0)


def extrapolation(share: float) -> Direction:
    """The gradient goes on changing as it did since the move before: g + share (g - g before), each over its RMS."""

    def direction(gradient: Tensor, before: list[Tensor]) -> Tensor:
        last = before[-1] if before else None
        before.append(_unit(gradient))
        return before[-1] if last is None else before[-1] + share * (before[-1] - last)

    return direction


def by_cell(power: float) -> Direction:
    """Each cell over a power of its own RMS: at 1 all cells move alike."""
    return lambda gradient, _: gradient / (_rms(gradient, (1,)) + 1e-3 * _rms(gradient, (1, 2, 3))) ** power


def by_channel(gradient: Tensor, _before: list[Tensor]) -> Tensor:
    """Each channel over its own RMS: all move alike."""
    return gradient / _rms(gradient, (2, 3))


def by_loss(factor: float) -> Length:
    """Polyak's step in z, factor L / |g|^2 g, at most three times as long as the planned one."""

    def length(run: Any, _percent: float, gradient: Tensor, planned: Any) -> Tensor:
        found = spread(run.losses[-1], gradient) / (gradient[0].numel() * _rms(gradient, (1, 2, 3)))
        return (factor * found / planned).clamp(max=3.0)

    return length


def sloped(first: float, last: float) -> Length:
    """The moves' lengths change evenly over the first half of the diffusion time."""
    return lambda _run, percent, _gradient, _planned: first + (last - first) * percent / 0.5


def _settings(**given: Any) -> Try:
    end, steps = given.pop("end_percent", 0.5), given.pop("steps", STEPS)
    return Try(settings=dataclasses.replace(GRADIENT_ALONE, **given), end_percent=end, steps=steps)


BASE = "fast, the gradient alone"
TRIES = {
    BASE: Try(),
    "unguided": Try(settings=None),
    "fast, each step": _settings(iterations=4),
    "feature target, 3 steps": _settings(feature_steps=3),
    "feature target, 6 steps": _settings(feature_steps=6),
    "feature target, 12 steps": _settings(feature_steps=12),
    "momentum 0.3": Try(direction=momentum(0.3)),
    "momentum 0.7": Try(direction=momentum(0.7)),
    "extrapolation 0.3": Try(direction=extrapolation(0.3)),
    "Polyak's length, 1": Try(length=by_loss(1.0)),
    "Polyak's length, 4": Try(length=by_loss(4.0)),
    "by cell, power 0.5": Try(direction=by_cell(0.5)),
    "by channel": Try(direction=by_channel),
    "longer moves first": Try(length=sloped(1.4, 0.6)),
    "longer moves last": Try(length=sloped(0.6, 1.4)),
    "strength 1.4": _settings(strength=1.4),
    "five moves to 0.7": _settings(interval=0.14, end_percent=0.7),
    "ten moves to 0.7": _settings(interval=0.07, end_percent=0.7),
    "negative prompt kept": _settings(keep_negative=1),
    "feature target, 4 steps; kept": _settings(feature_steps=4, keep_negative=1),
    "feature target, 6 steps; kept": _settings(feature_steps=6, keep_negative=1),
    "feature target, 6 steps; kept; seven moves to 0.7": _settings(feature_steps=6, keep_negative=1, end_percent=0.7),
    "feature target, 4 steps; kept; 2 iterations": _settings(feature_steps=4, keep_negative=2, iterations=2),
    "feature target, 4 steps; kept; ten moves to 0.6": _settings(
        feature_steps=4, keep_negative=2, interval=0.06, end_percent=0.6
    ),
    "feature target, 4 steps; kept; ten moves to 0.7": _settings(
        feature_steps=4, keep_negative=2, interval=0.07, end_percent=0.7
    ),
    "8 steps": _settings(steps=8),
    "8 steps; negative prompt kept": _settings(steps=8, keep_negative=1),
}


@torch.inference_mode()
def measure_tries(
    world: World, tries: dict[str, Try] | None = None, heads: tuple[str, ...] = HEADS
) -> list[dict[str, Any]]:  # fmt: skip
    """A row a try: the error of each head, in its unit; the geometric mean of their ratios to the first try's; how many
    heads are better and worse than there by more than two standard errors of the paired differences; the share of the prompt
    (the figure's colour, the wall's) that is to be seen; for a picture, passes of one prompt, backward passes and runs of
    the head; and SD1.5's operations, were it made so, over an unguided picture's.
    """
    tries, counted = tries or TRIES, count(SHAPES["sd15"], "full")
    rows = {name: _Row() for name in tries}
    for name in heads:
        recipe, head = demo_recipe(name), demo_head(name)
        for way, row in rows.items():
            errors, idea = [], tries[way]
            with _tried(idea) as moving, _counted(world, head, row.passes) as seen:
                target = functools.partial(_ending, idea.end_percent)
                for made in steer(seen, recipe, head, {way: Way(settings=idea.settings, steps=idea.steps)}, target):
                    scores = scene_scores(world, recipe, made)
                    errors.append(1 - scores["iou"] if "iou" in scores else scores["error"])
                    asked = read_caption(made.prompt)
                    row.seen += [each.has(asked)[of] for each in look(made.pictures, world.estimator) for of in SEEN]
                    moving.clear()
            row.errors[name] = np.concatenate(errors)
    base, pictures = next(iter(rows.values())), world.pictures * len(heads)
    return [row.told(way, base, pictures, counted, tries[way]) for way, row in rows.items()]


@dataclasses.dataclass
class _Row:
    """errors of each picture by head; seen: what of the prompts is; passes of prompts and runs of heads, of all pictures."""

    errors: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    seen: list[float] = dataclasses.field(default_factory=list)
    passes: dict[str, int] = dataclasses.field(default_factory=lambda: {"network": 0, "head": 0})

    def told(self, way: str, base: _Row, pictures: int, counted: Counts, idea: Try) -> dict[str, Any]:
        means = {name.removeprefix("demo_"): float(f"{each.mean():.3g}") for name, each in self.errors.items()}
        ratios = [each.mean() / base.errors[name].mean() for name, each in self.errors.items()]
        surely = [_surely(each - base.errors[name]) for name, each in self.errors.items()]
        network, head = (self.passes[name] / pictures for name in ("network", "head"))
        backward = head / (1 if idea.settings is None else idea.settings.feature_steps)  # one after each reading
        operations = network * counted.forward + backward * counted.backward + head * counted.head
        return {
            "try": way, **means, "of default": round(float(np.exp(np.mean(np.log(ratios)))), 3),
            "better": surely.count(-1), "worse": surely.count(1), "prompt": round(float(np.mean(self.seen)), 3),
            "passes": network, "backward": backward, "head": head,
            "SD1.5": round(operations / (2 * idea.steps * counted.forward), 3),
        }  # fmt: skip


def _surely(differences: np.ndarray) -> int:
    """The sign of their mean, if it is two standard errors from 0; else 0."""
    error = differences.std(ddof=1) / len(differences) ** 0.5
    return int(np.sign(differences.mean())) if abs(differences.mean()) > 2 * error else 0


def _ending(end_percent: float, *scene: Any) -> Target:
    return dataclasses.replace(scene_target(*scene), end_percent=end_percent)


@contextlib.contextmanager
def _tried(idea: Try) -> Iterator[list[Tensor]]:
    """Moves are made so; gives what a run remembers of its moves, to be cleared after each."""
    make, before = step._move, list[Tensor]()

    def move(run: Any, planned: Any, call: Any, gradient: Tensor, length: Any, lands: float) -> Tensor:
        gradient = gradient.float()
        if idea.length is not None:
            length = length * idea.length(run, planned.percent, gradient, length)
        if idea.direction is not None:
            remembered = len(before)
            gradient = idea.direction(gradient, before)
            if len(before) == remembered:
                before.append(_unit(gradient))
        return make(run, planned, call, gradient, length, lands)

    with mock.patch.object(step, "_move", move):
        yield before


@contextlib.contextmanager
def _counted(world: World, head: Any, passes: dict[str, int]) -> Iterator[World]:
    """The world with a model whose passes of prompts, and the head's, are counted into ``passes``, a picture at a time."""
    model = world.model.clone()

    def apply(executor: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        passes["network"] += len(x)
        return executor(x, *args, **kwargs)

    def read(_head: Any, _given: Any, out: Tensor) -> None:
        passes["head"] += len(out)

    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, apply)
    handle = head.network.register_forward_hook(read)
    try:
        yield dataclasses.replace(world, model=model)
    finally:
        handle.remove()


def _rms(gradient: Tensor, axes: tuple[int, ...]) -> Tensor:
    return gradient.square().mean(axes, keepdim=True).sqrt().clamp_min(1e-30)


def _unit(gradient: Tensor) -> Tensor:
    """Over its RMS in each picture."""
    return gradient / _rms(gradient, (1, 2, 3))
