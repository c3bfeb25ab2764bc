"""Backward through a long way in the memory of its longest step: each step keeps its input and runs again in backward.

This is what the authors' code does as it is run (memcnn with ``keep_input=True``). torch.utils.checkpoint without
re-entrance grows with the number of steps instead.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..loaded.frozen_layers import plain
from ..loaded.memory import is_out_of_memory

Function = Callable[[Tensor], Tensor]
Scope = Callable[[], contextlib.AbstractContextManager[Any]]


class Stage:
    """One step of the way: a function of one tensor.

    run: it, as ComfyUI runs it; with_graph: the same where autograd is on, run inside of ``scope``; backward: instead of
    that, the gradient of the input, given the input and the result's gradient; ready: makes sure that its model is loaded;
    lighten: takes less memory from now on, and says whether that is possible; on_cpu: where its input is kept.
    """

    def __init__(
        self,
        run: Function,
        scope: Scope,
        *,
        with_graph: Function | None = None,
        backward: Callable[[Tensor, Tensor], Tensor] | None = None,
        ready: Callable[[], None] = lambda: None,
        lighten: Callable[[], bool] = lambda: False,
        on_cpu: bool = False,
    ) -> None:
        self._run, self._with_graph, self._backward = run, with_graph or run, backward or self._differentiate
        self._scope, self._ready, self._lighten, self._on_cpu = scope, ready, lighten, on_cpu

    def __call__(self, x: Tensor) -> Tensor:
        """The result, with a graph of this step alone where autograd asks for one."""
        if torch.is_grad_enabled() and x.requires_grad:
            return _Rerun.apply(x, self)
        return self.forward(x)

    def keep(self, x: Tensor) -> Tensor:
        return x.detach().to("cpu", copy=True) if self._on_cpu else x.detach().clone()

    def forward(self, x: Tensor) -> Tensor:
        self._ready()
        with torch.inference_mode():
            y = self._run(x.detach())
        with torch.inference_mode(False):
            return plain(y)

    def pull(self, kept: Tensor, gradient: Tensor) -> Tensor:
        """The gradient of the result, as one of the input (the vector-Jacobian product).

        On the way it is scaled by a power of two to a largest element of 1..2, so that half precision neither underflows nor
        overflows. Out of memory, it is tried once more in less.
        """
        gain = gain_of([gradient])
        if gain is None:
            return torch.zeros_like(kept, device=gradient.device)
        scaled = gradient * gain
        try:
            found = self._pull(kept, scaled)
        except Exception as error:
            if not (is_out_of_memory(error) and self._lighten()):
                raise
            found = None
        if found is None:  # out of the handler, which holds on to what did not fit
            found = self._pull(kept, scaled)
        return found / gain

    def _pull(self, kept: Tensor, gradient: Tensor) -> Tensor:
        self._ready()
        with self._scope(), torch.enable_grad():
            return self._backward(kept.to(gradient.device).clone().requires_grad_(), gradient)

    def _differentiate(self, leaf: Tensor, gradient: Tensor) -> Tensor:
        y = self._with_graph(leaf)
        return torch.autograd.grad(y, leaf, gradient.to(y.dtype))[0]


def gain_of(gradients: Sequence[Tensor]) -> float | None:
    """The power of two that brings their largest element to 1..2; 1 where it is not finite, None where it is 0."""
    largest = max(float(gradient.detach().abs().amax()) for gradient in gradients)
    if largest == 0:
        return None
    return 2.0 ** -max(min(math.floor(math.log2(largest)), 120), -120) if math.isfinite(largest) else 1.0


class _Rerun(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, stage: Stage) -> Tensor:  # type: ignore[override]
        ctx.stage, ctx.kept, ctx.device = stage, stage.keep(x), x.device
        return stage.forward(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.stage.pull(ctx.kept, gradient).to(ctx.device), None
