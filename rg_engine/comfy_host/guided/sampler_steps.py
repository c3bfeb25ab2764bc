"""Follows a sampler: which of its model calls begins a step, and which tensor is its own latent.

ComfyUI's samplers report once a step through a callback, after the step's first model call. Some call the model more
often; a step is guided at its first call only.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, SupportsFloat

from torch import Tensor

from ...guidance import Plan
from ...guidance.schedule import PlannedStep

#: Samplers that, after their callback, call the model at the next step's sigma before that step begins, and how often.
CALLS_AT_NEXT_SIGMA = {
    "sample_heun": 1,
    "sample_heunpp2": 1,
    "sample_exp_heun_2_x0": 1,
    "sample_exp_heun_2_x0_sde": 1,
}
#: Samplers that choose their own sigmas between the schedule's ends: a planned step is guided when they have passed it.
CHOOSE_OWN_SIGMAS = ("dpm_fast_function", "dpm_adaptive_function")
#: Samplers that hand the model a scaled copy and correct their latent afterwards: moves are added after the correction.
MOVED_AFTERWARDS = ("sample_unipc", "sample_unipc_bh2")


class SamplerSteps:
    """One pass of a sampler over its schedule."""

    def __init__(self, plan: Plan, sampler: Any, sigmas: list[float]) -> None:
        self._sigmas = sigmas
        name = _name(getattr(sampler, "sampler_function", None))
        self._skip = CALLS_AT_NEXT_SIGMA.get(name, 0)
        self._free = name in CHOOSE_OWN_SIGMAS
        self.moved_afterwards = name in MOVED_AFTERWARDS
        self.waiting_move: Tensor | None = None  # in z, until the sampler's next correction
        self._pending = list(plan.steps)
        self._step = 0
        self._calls = 0  # since the last callback, at the coming step's sigma
        self.latent: Tensor | None = None  # the sampler's own tensor, while it calls the model

    @property
    def missed(self) -> int:
        """Planned steps that did not come."""
        return len(self._pending)

    def planned(self, at: SupportsFloat) -> PlannedStep | None:
        """The plan for the model call at a sigma, if it begins a guided step.

        A tensor's value is looked at only where it may: that waits for the device.
        """
        if not self._pending or (not self._free and self._pending[0].step > self._step):
            return None
        sigma = float(at)
        if self._free:
            if self._calls or sigma > self._pending[0].sigma * 1.001:
                return None
            passed = [p for p in self._pending if sigma <= p.sigma * 1.001]
            self._pending = self._pending[len(passed) :]
            return PlannedStep(
                step=passed[0].step, sigma=sigma, active=passed[-1].active, length=sum(p.length for p in passed)
            )
        coming = self._sigmas[min(self._step, len(self._sigmas) - 1)]
        if not math.isclose(sigma, coming, rel_tol=1e-3):
            return None
        first = self._calls == (self._skip if self._step else 0)
        self._calls += 1
        if not first:
            return None
        while self._pending and self._pending[0].step < self._step:
            self._pending.pop(0)
        return self._pending.pop(0) if self._pending and self._pending[0].step == self._step else None

    def finished_call(self) -> None:
        if self._free:
            self._calls += 1

    def finished_step(self) -> None:
        """To be called from the sampler's callback."""
        self._step += 1
        self._calls = 0


def _name(function: Any) -> str:
    """A sampler function's name; "" where it has none (an object that can be called)."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", "")


def watched(sampler: Any, steps: Callable[[], SamplerSteps | None]) -> Any:
    """A copy of a KSAMPLER that shows its own latent to ``steps()`` while it calls the model.

    With a denoise mask the model is given a blend, not the sampler's latent; guidance has to move the latent itself.
    Samplers of other kinds are returned as they are.
    """
    function = getattr(sampler, "sampler_function", None)
    if function is None:
        return sampler

    @functools.wraps(function)
    def sample(model: Any, *args: Any, **kwargs: Any) -> Tensor:
        afterwards = _unipc_moves(steps) if _name(function) in MOVED_AFTERWARDS else contextlib.nullcontext()
        with afterwards:
            return function(_WatchedModel(model, steps), *args, **kwargs)

    shown = copy.copy(sampler)
    shown.sampler_function = sample
    return shown


@contextlib.contextmanager
def _unipc_moves(steps: Callable[[], SamplerSteps | None]) -> Iterator[None]:
    """UniPC keeps its latent (at the network's scale) to itself; the move that waits is added as it leaves an update."""
    from comfy.extra_samplers.uni_pc import UniPC

    original = UniPC.multistep_uni_pc_update

    def update(self: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        x, model_x = original(self, *args, **kwargs)
        now = steps()
        if now is not None and now.waiting_move is not None:
            x, now.waiting_move = x + now.waiting_move, None
        return x, model_x

    UniPC.multistep_uni_pc_update = update
    try:
        yield
    finally:
        UniPC.multistep_uni_pc_update = original


class _WatchedModel:
    def __init__(self, model: Any, steps: Callable[[], SamplerSteps | None]) -> None:
        self._model = model
        self._steps = steps

    def __call__(self, x: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        steps = self._steps()
        if steps is not None:
            steps.latent = x
        try:
            return self._model(x, sigma, **kwargs)
        finally:
            if steps is not None:
                steps.latent = None
                steps.finished_call()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)
