"""When to guide, and how far each time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

from ..errors import TargetError
from ..types import MODES, Mode

#: Fast mode's path length (RMS, in z) per unit of diffusion time at strength 1. The paper's 50 sign steps of 0.02 over
#: the first half of the time make a path of 1.
PATH_PER_TIME = 2.0
#: Fast mode guides at most once in so much of the diffusion time: few long moves steer as well as many short ones.
FAST_INTERVAL = 0.1
#: With drags, more often: what is dragged has to be found again after each move.
DRAG_INTERVAL = 0.02
#: With the look of a reference: it builds up over the whole time.
LOOK_INTERVAL = 0.05
#: Fast mode leaves out a step that stands for less of the diffusion time: one on the very end of its range.
MIN_TIME = 1e-4


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuidanceSettings:
    """How to guide.

    strength 1.0 is the paper's amount in both modes. iterations counts the moves of each interval of the diffusion time
    (0..1) in fast mode, and the updates of a step in reference mode. source_cfg below 0 is the guided run's own cfg.
    """

    strength: float = 1.0
    mode: Mode = "fast"
    iterations: int = 1
    source_cfg: float = -1.0
    interval: float = FAST_INTERVAL

    def __post_init__(self) -> None:
        if not math.isfinite(self.strength) or self.strength < 0:
            raise TargetError(f"strength is {self.strength}: it must be 0 or more")
        if self.mode not in MODES:
            raise TargetError(f"mode {self.mode!r} is unknown: choose one of {', '.join(MODES)}")
        if self.iterations < 1:
            raise TargetError(f"iterations is {self.iterations}: it must be 1 or more")
        if not 0 <= self.interval <= 1:
            raise TargetError(f"interval is {self.interval}: it is a part of the diffusion time, 0..1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedStep:
    """One guided step: the sampler's step, its sigma, which targets guide in it, and the length of the move (RMS, in z)."""

    step: int
    sigma: float
    active: tuple[int, ...]
    length: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The guided steps of a run, in order."""

    steps: tuple[PlannedStep, ...]

    def at(self, step: int) -> PlannedStep | None:
        return next((planned for planned in self.steps if planned.step == step), None)


def make_plan(
    ranges: Sequence[tuple[float, float]],
    sigmas: Sequence[float],
    settings: GuidanceSettings,
    percent_to_sigma: Callable[[float], float],
) -> Plan:
    """Choose the guided steps.

    A target guides in the steps whose sigma lies in its range, both ends included, as on ControlNet. In fast mode a step
    is skipped until ``interval / iterations`` of the diffusion time has passed since the last guided one; each guided step
    stands for the time until the next (or until its targets end), the first one of a range also for the time since the
    range began, and its move is in proportion.

    Args: ranges, each target's start and end percent; sigmas (steps + 1), descending, of the sampler; percent_to_sigma of
    the model.
    """
    if settings.strength == 0:
        return Plan(steps=())
    interval = settings.interval / settings.iterations
    limits = [(percent_to_sigma(start), percent_to_sigma(end)) for start, end in ranges]
    chosen: list[tuple[int, float, tuple[int, ...]]] = []
    last = -math.inf
    for step, sigma in enumerate(sigmas[:-1]):
        active = tuple(i for i, (start, end) in enumerate(limits) if end <= sigma <= start)
        percent = percent_of(sigma, percent_to_sigma)
        if not active or (settings.mode == "fast" and percent - last < interval * 0.999):
            continue
        chosen.append((step, percent, active))
        last = percent
    planned = []
    guided_until = percent_of(sigmas[0], percent_to_sigma)
    for k, (step, percent, active) in enumerate(chosen):
        end = max(ranges[i][1] for i in active)
        if k + 1 < len(chosen):
            end = min(end, chosen[k + 1][1])
        end = min(end, percent_of(sigmas[-1], percent_to_sigma))
        since = max(min(ranges[i][0] for i in active), guided_until)
        guided_until = max(end, guided_until)
        length = settings.strength * PATH_PER_TIME * max(end - min(since, percent), 0.0)
        if settings.mode == "fast" and end - since < MIN_TIME:
            continue
        planned.append(PlannedStep(step=step, sigma=float(sigmas[step]), active=active, length=length))
    return Plan(steps=tuple(planned))


def percent_of(sigma: float, percent_to_sigma: Callable[[float], float]) -> float:
    """The inverse of ``percent_to_sigma`` (which falls), by bisection; 0 at or above the first sigma, 1 at 0."""
    low, high = 0.0, 1.0
    for _ in range(24):
        middle = (low + high) / 2
        if percent_to_sigma(middle) > sigma:
            low = middle
        else:
            high = middle
    return high if high > 1e-6 else 0.0
