"""Which of a sampler's model calls is guided: for each planned step, the first one at its noise level or below.

Since a move reaches the sampler through its frame (:mod:`.frame`), it does not matter which call of a step that is; samplers
may call the model as often as they like, and at noise levels of their own.
"""

from __future__ import annotations

import math
from typing import SupportsFloat

from ...guidance import Plan
from ...guidance.schedule import PlannedStep

CLOSE = 1e-3


class SamplerSteps:
    """One pass of a sampler over its schedule."""

    def __init__(self, plan: Plan, sigmas: list[float]) -> None:
        self._sigmas = sigmas
        self._pending = list(plan.steps)
        self._step = 0
        self._follows = False  # whether it has been seen at the schedule's noise level of a later step

    @property
    def missed(self) -> int:
        """Planned steps that did not come."""
        return len(self._pending)

    def planned(self, at: SupportsFloat) -> PlannedStep | None:
        """The plan for the model call at a sigma, if it is to be guided; steps that were passed over count as one.

        A tensor's value is looked at only where it may matter: that waits for the device.
        """
        if not self._pending or (self._follows and self._pending[0].step > self._step):
            return None
        sigma = float(at)
        coming = self._sigmas[min(self._step, len(self._sigmas) - 1)]
        self._follows = self._step > 0 and math.isclose(sigma, coming, rel_tol=CLOSE)
        passed = [planned for planned in self._pending if sigma <= planned.sigma * (1 + CLOSE)]
        if not passed:
            return None
        self._pending = self._pending[len(passed) :]
        if len(passed) == 1:
            return passed[0]
        last = passed[-1]
        return PlannedStep(
            step=last.step, sigma=sigma, percent=last.percent, active=last.active, lands=last.lands,
            length=sum(planned.length for planned in passed),
        )  # fmt: skip

    def finished_step(self) -> None:
        """To be called from the sampler's callback."""
        self._step += 1
