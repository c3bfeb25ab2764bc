"""When to guide, and how far each time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

from torch import Tensor

from ..errors import TargetError
from ..types import MODES, Mode
from .keyframes import Keyframes

#: Fast mode's path length (RMS, in z) per unit of diffusion time at strength 1. The paper's 50 sign steps of 0.02 over
#: the first half of the time make a path of 1 where they are made and, since z's scale changes from step to step, of 1.25
#: where each tenth of the time ends: a move of fast mode stands for such a tenth and is measured where it is taken.
PATH_PER_TIME = 2.5
#: Moves that the model sees at once, before the sampler's step shrinks them, are measured where they are made, where the
#: paper's path is so much of that.
PATH_WHERE_MADE = 0.8
#: Fast mode guides at most once in so much of the diffusion time: few long moves steer as well as many short ones.
FAST_INTERVAL = 0.1
#: With drags, more often: what is dragged has to be found again after each move.
DRAG_INTERVAL = 0.02
#: With the look of a reference: it builds up over the whole time.
LOOK_INTERVAL = 0.05
#: Fast mode leaves out a step that stands for less of the diffusion time: one on the very end of its range.
MIN_TIME = 1e-4
#: The noise level that Stable Diffusion's own schedule begins at, and the paper's runs with it.
PAPER_SIGMA = 14.6147


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuidanceSettings:
    """How to guide.

    strength 1.0 is the paper's amount in both modes. iterations counts the moves of each interval of the diffusion time
    (0..1) in fast mode, and the updates of a step in reference mode. source_cfg below 0 is the guided run's own cfg.
    keyframes multiply strength over the diffusion time, for each picture. Of fast mode alone: feature_steps, how often the
    heads run at a move to find where the features should go (see :mod:`.feature_target`), 1 is the gradient alone;
    keep_negative, how many guided steps in a row go without the negative prompt's pass, its prediction taken from the step
    before.
    """

    strength: float = 1.0
    mode: Mode = "fast"
    iterations: int = 1
    source_cfg: float = -1.0
    interval: float = FAST_INTERVAL
    keyframes: Keyframes | None = None
    feature_steps: int = 4
    keep_negative: int = 2

    def __post_init__(self) -> None:
        if not math.isfinite(self.strength) or self.strength < 0:
            raise TargetError(f"strength is {self.strength}: it must be 0 or more")
        if self.mode not in MODES:
            raise TargetError(f"mode {self.mode!r} is unknown: choose one of {', '.join(MODES)}")
        if self.iterations < 1:
            raise TargetError(f"iterations is {self.iterations}: it must be 1 or more")
        if self.feature_steps < 1:
            raise TargetError(f"feature_steps is {self.feature_steps}: it must be 1 or more")
        if self.keep_negative < 0:
            raise TargetError(f"keep_negative is {self.keep_negative}: it must be 0 or more")
        if not 0 <= self.interval <= 1:
            raise TargetError(f"interval is {self.interval}: it is a part of the diffusion time, 0..1")

    @property
    def head_runs(self) -> int:
        """Of a move."""
        return self.feature_steps if self.mode == "fast" else 1

    @property
    def spared(self) -> int:
        """Guided steps in a row without the negative prompt's pass."""
        return self.keep_negative if self.mode == "fast" else 0

    def strengths_at(self, percent: float, batch: int) -> Tensor | None:
        """What keyframes multiply the strength with then, (B,); None without any."""
        return None if self.keyframes is None else self.keyframes.at(percent, batch)

    def strongest_at(self, percent: float) -> float:
        """The largest multiplier then."""
        return 1.0 if self.keyframes is None else self.keyframes.most(percent)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedStep:
    """One guided step.

    step, sigma, percent: the sampler's step, its noise level and its place in the diffusion time; active: which targets
    guide in it; length: of its move (RMS, in z), made in so many moves; lands: the noise level at which it is that long.
    """

    step: int
    sigma: float
    percent: float
    active: tuple[int, ...]
    length: float
    lands: float
    moves: int = 1


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
    counts: Callable[[int, float], bool] = lambda i, percent: True,
    closest: float = 1.0,
) -> Plan:
    """Choose the guided steps.

    A target guides in the steps whose sigma lies in its range, both ends included, as on ControlNet. Fast mode makes a move
    every ``interval / iterations`` of the diffusion time, at the nearest step; where steps are longer than that, several in
    one. So about as many moves are made at any number of steps. Each guided step stands for the time until the next (or
    until its targets end), the first one of a range also for the time since the range began, and its move is in proportion.

    Args: ranges, each target's start and end percent; sigmas (steps + 1), descending, of the sampler; percent_to_sigma of
    the model; counts(i, percent), whether target i counts then at all; closest, a shorter interval to choose steps at.
    """
    if settings.strength == 0:
        return Plan(steps=())
    part = settings.interval / settings.iterations if settings.mode == "fast" else 0.0
    often = min(part, closest / settings.iterations)
    limits = [(percent_to_sigma(start), percent_to_sigma(end)) for start, end in ranges]
    began, finish = (percent_of(sigma, percent_to_sigma) for sigma in (sigmas[0], sigmas[-1]))
    origin = max(began, min((start for start, _ in ranges), default=0.0))
    found: list[tuple[int, float, tuple[int, ...]]] = []  # steps in which anything guides
    for step, sigma in enumerate(sigmas[:-1]):
        in_range = [i for i, (start, end) in enumerate(limits) if end <= sigma <= start]
        percent = percent_of(sigma, percent_to_sigma) if in_range else 0.0
        active = tuple(i for i in in_range if counts(i, percent))
        if active and settings.strongest_at(percent):
            found.append((step, percent, active))
    until = min(max((end for _, end in ranges), default=0.0), finish)
    chosen = _every(often, found, origin, until) if often else found
    planned = []
    guided_until = began
    for k, (step, percent, active) in enumerate(chosen):
        end = max(ranges[i][1] for i in active)
        if k + 1 < len(chosen):
            end = min(end, chosen[k + 1][1])
        end = min(end, finish)
        since = max(min(ranges[i][0] for i in active), guided_until)
        guided_until = max(end, guided_until)
        length = settings.strength * PATH_PER_TIME * max(end - min(since, percent), 0.0)
        if settings.mode == "fast" and end - since < MIN_TIME:
            continue
        sigma, lands = float(sigmas[step]), landing(settings.mode, float(sigmas[step]), float(sigmas[step + 1]))
        first, last = ((time - origin) / part if part else 0 for time in (min(since, percent), end))
        moves = max(1, round(last) - round(first))
        planned.append(
            PlannedStep(step=step, sigma=sigma, percent=percent, active=active, length=length, lands=lands, moves=moves)
        )
    return Plan(steps=tuple(planned))


def _every(
    part: float, steps: list[tuple[int, float, tuple[int, ...]]], origin: float, until: float
) -> list[tuple[int, float, tuple[int, ...]]]:
    """Of (step, percent, targets), those nearest to every ``part`` of the time from origin, and each target's first."""
    picked = {next(k for k, each in enumerate(steps) if i in each[2]) for _, _, active in steps for i in active}
    for number in range(max(1, math.ceil((until - origin) / part - 0.25)) if steps else 0):
        time = origin + number * part
        picked.add(min(range(len(steps)), key=lambda k: abs(steps[k][1] - time)))
    return [steps[k] for k in sorted(picked)]


def landing(mode: Mode, sigma: float, next_sigma: float) -> float:
    """The noise level at which the length of a move is measured in z.

    A move of x survives a sampler's step as it is, while z = x * input_scale(sigma) is another measure at each noise level:
    from 4518 to 38, the first step of a zero-terminal-SNR schedule, a move grows 118 times in it. So a move is measured
    where the sampler takes it. Reference mode is measured where the paper's code does, at the step itself, as far as that
    code's noise levels go.
    """
    return min(sigma, max(next_sigma, PAPER_SIGMA)) if mode == "reference" else next_sigma


def percent_of(sigma: float, percent_to_sigma: Callable[[float], float]) -> float:
    """The inverse of ``percent_to_sigma`` (which falls), to about 1e-7; 0 at or above the first sigma, 1 at 0.

    By false position in log sigma (the Illinois way): each value is a dozen launches, and bisection asks for twice as many.
    """
    if sigma <= 0:
        return 1.0
    low, high, above, below = 0.0, 1.0, math.inf, -math.inf  # log(the sigma there / sigma) at both ends
    last = math.nan
    while high - low > 1e-7:
        known = math.isfinite(above) and math.isfinite(below)
        middle = low + (high - low) * (above / (above - below) if known else 0.5)
        there = percent_to_sigma(middle)
        finite = 0 < there < math.inf and sigma < math.inf
        found = math.log(there / sigma) if finite else (math.inf if there > sigma else -math.inf)
        if abs(found) < 2e-7:
            return middle if middle > 1e-6 else 0.0
        if found > 0:
            below *= 0.5 if low == last else 1.0  # the same end twice: give the other one less weight
            low = last = middle
            above = found
        else:
            above *= 0.5 if high == last else 1.0
            high = last = middle
            below = found
    return high if high > 1e-6 else 0.0
