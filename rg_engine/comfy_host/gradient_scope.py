"""Gradients through a loaded ComfyUI model, without copying its weights.

ComfyUI runs nodes in inference mode, and weights loaded there are inference tensors, which autograd refuses to keep. For
the time of one pass :func:`gradient_scope` replaces

* each such parameter by an ordinary tensor over the same storage (nothing is copied), and
* the forward of each layer that casts its weights when it runs (offloaded, dynamic, quantised or patched ones) by a
  frozen-weight Function, which fetches the weight again in backward, so that no cast copy is kept in the graph.

Everything is as before when the scope ends, also after an error.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import comfy.ops
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv1d_input, conv2d_input, conv3d_input

MISSING = object()
_CONVOLUTIONS = {nn.Conv1d: conv1d_input, nn.Conv2d: conv2d_input, nn.Conv3d: conv3d_input}


@contextlib.contextmanager
def gradient_scope(network: nn.Module) -> Iterator[None]:
    """Inside, autograd is on and ``network`` can be differentiated with respect to its inputs."""
    kept: list[tuple[dict[str, Any], str, Any]] = []  # (table, name, what it held); MISSING if nothing
    try:
        with torch.inference_mode(False), torch.enable_grad():
            for module in network.modules():
                if casts_weights(module):
                    kept.append((module.__dict__, "forward", module.__dict__.get("forward", MISSING)))
                    module.forward = _frozen_forward(module)  # type: ignore[method-assign]
                else:
                    _alias_tensors(module, kept)
            yield
    finally:
        for table, name, value in reversed(kept):
            if value is MISSING:
                del table[name]
            else:
                table[name] = value


def plain(value: Any) -> Any:
    """``value`` with every inference tensor in it (nested in lists, tuples and dicts too) copied to an ordinary one."""
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() else value
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    if type(value) is tuple:
        return tuple(plain(item) for item in value)
    return value


def casts_weights(module: nn.Module) -> bool:
    """Whether this layer makes its weights anew each time it runs."""
    if not isinstance(module, (nn.Linear, nn.GroupNorm, nn.LayerNorm, *_CONVOLUTIONS)) or module.weight is None:
        return False
    return bool(
        getattr(module, "comfy_cast_weights", False)
        or getattr(module, "weight_function", None)
        or getattr(module, "bias_function", None)
        or hasattr(module, "_v")
    )


def _alias_tensors(module: nn.Module, kept: list[tuple[dict[str, Any], str, Any]]) -> None:
    """Replace a module's inference parameters and buffers by ordinary tensors over the same storages."""
    tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
    for table in tables:
        for name, tensor in table.items():
            if tensor is not None and tensor.is_inference() and type(tensor.data) is Tensor:
                kept.append((table, name, tensor))
                empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
                alias = empty.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())
                table[name] = nn.Parameter(alias, requires_grad=False) if table is module._parameters else alias


def _frozen_forward(module: nn.Module) -> Callable[..., Tensor]:
    original = module.forward

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or not x.requires_grad:
            return original(x, *args, **kwargs)
        return _FrozenLayer.apply(x, module, original)

    return forward


class _FrozenLayer(torch.autograd.Function):
    """A layer whose weight is fetched in forward and again in backward, and never kept in between."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: nn.Module, original: Any) -> Tensor:  # type: ignore[override]
        ctx.module = module
        ctx.shape, ctx.dtype = x.shape, x.dtype
        if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
            ctx.save_for_backward(x)
        return original(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        module = ctx.module
        weight, bias = (plain(t) for t in comfy.ops.cast_bias_weight(module, gradient))
        if isinstance(module, nn.Linear):
            return (gradient @ weight).to(ctx.dtype), None, None
        if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
            with torch.enable_grad():
                x = ctx.saved_tensors[0].detach().requires_grad_()
                if isinstance(module, nn.GroupNorm):
                    y = F.group_norm(x, module.num_groups, weight.to(x.dtype), bias.to(x.dtype), module.eps)
                else:
                    bias = None if bias is None else bias.to(x.dtype)
                    y = F.layer_norm(x, module.normalized_shape, weight.to(x.dtype), bias, module.eps)
                return torch.autograd.grad(y, x, gradient)[0], None, None
        input_gradient = next(fn for kind, fn in _CONVOLUTIONS.items() if isinstance(module, kind))
        moved = input_gradient(ctx.shape, weight, gradient, module.stride, module.padding, module.dilation, module.groups)
        return moved.to(ctx.dtype), None, None
