"""A backward for comfy_kitchen's kernels, which have none (ComfyUI of 2026: rotary embeddings, modulated norms)."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

try:
    from comfy_kitchen.backends.eager import adaln, rope

    _EAGER: tuple[Any, ...] = (rope, adaln)
except ImportError:  # a ComfyUI without it
    _EAGER = ()
PREFIX = "comfy_kitchen::"
_on: contextvars.ContextVar[bool] = contextvars.ContextVar("kernels_with_backward", default=False)


@contextlib.contextmanager
def kernels_with_backward(on: bool = True) -> Iterator[None]:
    """A scope in which kitchen's kernels can be differentiated. What they compute stays the same."""
    if not on or not _EAGER:
        yield
        return
    before = _on.set(True)
    try:
        with _KernelsWithBackward():
            yield
    finally:
        _on.reset(before)


def have_backward() -> bool:
    """Whether :func:`kernels_with_backward` is on: what runs again in backward, where it is not, has to turn it on."""
    return _on.get()


class _KernelsWithBackward(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)) and torch.is_grad_enabled():
            eager = _eager(getattr(func, "_qualified_op_name", None) or func.name())
            if eager is not None and any(isinstance(value, Tensor) and value.requires_grad for value in args):
                return _Kernel.apply(func, eager, kwargs, *args)
        return func(*args, **kwargs)


class _Kernel(torch.autograd.Function):
    """Forward is the kernel, backward that of the same computation in Python."""

    @staticmethod
    def forward(ctx: Any, kernel: Callable[..., Any], eager: Callable[..., Any], kwargs: Any, *args: Any) -> Any:  # type: ignore[override]
        ctx.eager, ctx.kwargs = eager, kwargs
        ctx.places = [i for i, value in enumerate(args) if isinstance(value, Tensor)]
        ctx.others = [None if isinstance(value, Tensor) else value for value in args]
        ctx.save_for_backward(*(args[i].clone() if args[i].is_inference() else args[i] for i in ctx.places))
        return kernel(*args, **kwargs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        args, wanted = list(ctx.others), []
        for i, tensor in zip(ctx.places, ctx.saved_tensors, strict=True):
            args[i] = tensor.detach().requires_grad_(ctx.needs_input_grad[3 + i])
            wanted += [i] if ctx.needs_input_grad[3 + i] else []
        with torch.enable_grad():
            out = ctx.eager(*args, **ctx.kwargs)
        found = dict(zip(wanted, torch.autograd.grad(out, [args[i] for i in wanted], gradients), strict=True))
        return None, None, None, *(found.get(i) for i in range(len(args)))


def _eager(name: str) -> Callable[..., Any] | None:
    """What computes the same as a kernel of this name in Python; None for other operations."""
    if not name.startswith(PREFIX):
        return None
    short = name[len(PREFIX) :].split(".")[0]
    return next((getattr(module, short) for module in _EAGER if hasattr(module, short)), None)
