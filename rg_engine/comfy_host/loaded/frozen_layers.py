"""Layers of a frozen network that keep less for backward than autograd does, with the same result.

* A frozen layer fetches its weight again in backward and keeps nothing: a weight that was offloaded, cast or patched for the
  forward pass is never held in between, and neither is a convolution's input, which only its weight's gradient needs.
* Elementwise parts (normalisation and activation before a convolution, the gate of a feed-forward layer) keep their input
  and run again in backward, and so do whole transformer blocks (:mod:`.run_again`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import comfy.ops
import torch
from comfy.ldm.modules.attention import GEGLU, BasicTransformerBlock
from comfy.rmsnorm import RMSNorm, rms_norm  # torch's, or ComfyUI's own beside a torch that has none
from torch import Tensor, nn
from torch.nn import functional as F

from .run_again import block_again, run_again
from .saved_tensors import ordinary

Forward = Callable[..., Any]
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.GroupNorm, nn.LayerNorm, RMSNorm)
_LAYERS = (nn.Linear, *_NORMS, *_CONVOLUTIONS)
#: What ComfyUI's quantised linear layers multiply their outputs, or their inputs, with.
_SCALES = ("scale_weight", "pre_quant_scale")


def frozen_forward(module: Any, casts: bool) -> Forward | None:
    """A forward for a layer that makes its weights anew each time it runs (``casts``), None for any other module."""
    if not casts or module.weight is None:
        return None
    return _frozen(module) if is_known(module) else _again(module)


def light_forward(module: nn.Module, casts: bool) -> Forward | None:
    """A forward that keeps as little as possible, None if there is nothing to gain."""
    if isinstance(module, BasicTransformerBlock):
        return block_again(module)
    if "forward" in module.__dict__:  # another node's
        return frozen_forward(module, casts)
    if isinstance(module, _CONVOLUTIONS) and is_known(module):
        return _frozen(module)
    if isinstance(module, GEGLU) and not _watched(module.proj):
        return _gate(module)
    if isinstance(module, nn.Sequential) and len(module) > 2 and isinstance(module[0], nn.GroupNorm):
        return _normed(module) if isinstance(module[1], nn.SiLU) and not _watched(*module[:2]) else None
    return frozen_forward(module, casts)


def may_be_light(module: nn.Module) -> bool:
    """Whether :func:`light_forward` may give a module without weights of its own a forward."""
    return isinstance(module, (BasicTransformerBlock, GEGLU, nn.Sequential))


def casts_weights(module: nn.Module) -> bool:
    """Whether this layer makes its weights anew each time it runs: offloaded, dynamic, patched or quantised ones."""
    if not isinstance(module, _LAYERS):
        return _is_quantised(module)
    return bool(
        getattr(module, "comfy_cast_weights", False)
        or getattr(module, "weight_function", None)
        or getattr(module, "bias_function", None)
        or "_v" in module.__dict__  # a Module takes long to find that it has no such attribute
    )


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


class _FrozenLayer(torch.autograd.Function):
    """A layer whose weight is fetched in forward and again in backward, and never kept in between."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: Any, original: Forward) -> Tensor:  # type: ignore[override]
        ctx.module, ctx.shape, ctx.dtype = module, x.shape, x.dtype
        if isinstance(module, _NORMS):
            ctx.save_for_backward(x)
        out = original(x)
        return ordinary(out) if out._is_view() else out  # autograd lets nobody write to a view that was made here

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        module = ctx.module
        with _weights(module, gradient) as (weight, bias):
            if _is_linear(module):
                moved = gradient @ weight
                for scale in (getattr(module, name, None) for name in _SCALES):
                    moved = moved if scale is None else moved * scale.to(moved)
                return moved.to(ctx.dtype), None, None
            if isinstance(module, _CONVOLUTIONS):
                nowhere = gradient.new_empty(1).expand(ctx.shape)  # its values don't matter for the gradient of the input
                settings = (module.stride, module.padding, module.dilation, False, [0] * len(module.stride), module.groups)
                backward = torch.ops.aten.convolution_backward
                moved = backward(gradient, nowhere, weight, None, *settings, (True, False, False))[0]
                return moved.to(ctx.dtype), None, None
            with torch.enable_grad():
                x = ctx.saved_tensors[0].detach().requires_grad_()
                scale, shift = (None if t is None else plain(t).to(x.dtype) for t in (weight, bias))
                if isinstance(module, nn.GroupNorm):
                    y = F.group_norm(x, module.num_groups, scale, shift, module.eps)
                elif isinstance(module, RMSNorm):
                    y = rms_norm(x, scale, module.eps)
                else:
                    y = F.layer_norm(x, module.normalized_shape, scale, shift, module.eps)
            return torch.autograd.grad(y, x, gradient)[0], None, None


@contextlib.contextmanager
def _weights(module: Any, like: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
    """A layer's weight and bias as ComfyUI makes them for an input like this one. It gets them back: weights of dynamic
    VRAM stay on the device otherwise, and a stream that offloads may write over them too early."""
    if not casts_weights(module):
        yield module.weight, module.bias
        return
    if not hasattr(comfy.ops, "uncast_bias_weight"):  # older ComfyUIs
        yield comfy.ops.cast_bias_weight(module, like)
        return
    weight, bias, stream = comfy.ops.cast_bias_weight(module, like, offloadable=True)
    try:
        quantised = isinstance(weight, getattr(comfy.ops, "QuantizedTensor", ()))
        yield weight.dequantize().to(like.dtype) if quantised else weight, bias
    finally:
        comfy.ops.uncast_bias_weight(module, weight, bias, stream)


def _is_linear(module: Any) -> bool:
    return isinstance(module, nn.Linear) or _is_quantised(module)


def _is_quantised(module: Any) -> bool:
    """Whether this is a linear layer that ComfyUI made for quantised weights, which is no torch.nn.Linear."""
    known = isinstance(module, comfy.ops.CastWeightBiasOp) and not isinstance(module, nn.Linear)
    return known and hasattr(module, "in_features")


def is_known(module: Any) -> bool:
    """Whether a layer is one of torch's or ComfyUI's own, as they made it, whose backward is known here."""
    if {"forward", "_conv_forward"} & module.__dict__.keys():  # another node's: LoRAs beside the weights, tiling
        return False
    if isinstance(module, _CONVOLUTIONS) and (isinstance(module.padding, str) or module.padding_mode != "zeros"):
        return False
    return type(module).__module__.partition(".")[0] in ("torch", "comfy")


def _frozen(module: nn.Module) -> Forward:
    original = module.forward

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or not (torch.is_grad_enabled() and x.requires_grad):
            return original(x, *args, **kwargs)
        return _FrozenLayer.apply(x, module, original)

    return forward


def _again(layer: nn.Module) -> Forward:
    original = layer.forward
    return lambda x, *args, **kwargs: run_again(lambda inner: original(inner, *args, **kwargs), x)


def _normed(layers: nn.Sequential) -> Forward:
    """A norm and its activation, run again, before the rest of the layers."""

    def forward(x: Tensor) -> Tensor:
        x = run_again(lambda inner: layers[1](layers[0](inner)), x)
        for layer in layers[2:]:
            x = layer(x)
        return x

    return forward


def _gate(module: GEGLU) -> Forward:
    def gated(both: Tensor) -> Tensor:
        value, gate = both.chunk(2, dim=-1)
        return value * F.gelu(gate)

    return lambda x: run_again(gated, module.proj(x))


def _watched(*modules: nn.Module) -> bool:
    return any(module._forward_hooks or module._forward_pre_hooks for module in modules)
