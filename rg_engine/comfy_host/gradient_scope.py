"""Gradients through a loaded ComfyUI model, without copying its weights.

ComfyUI runs nodes in inference mode, and weights loaded there are inference tensors, which autograd refuses to keep. For
the time of one pass :func:`gradient_scope` replaces

* the forward of layers that can do with less memory than autograd's (:mod:`.frozen_layers`), and
* each other inference parameter by an ordinary tensor over the same storage (nothing is copied).

Everything is as before when the scope ends, also after an error.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .frozen_layers import casts_weights, lean_forward, light_forward, plain

__all__ = ["Graph", "gradient_scope", "plain"]
#: What is kept for backward. autograd: what autograd keeps (layers whose weights are cast excepted), to compare with; lean:
#: less, at the same speed; light: least, at the cost of running transformer blocks twice.
Graph = Literal["autograd", "lean", "light"]
MISSING = object()


@contextlib.contextmanager
def gradient_scope(network: nn.Module, graph: Graph = "lean") -> Iterator[None]:
    """Inside, autograd is on and ``network`` can be differentiated with respect to its inputs."""
    kept: list[tuple[dict[str, Any], str, Any]] = []  # (table, name, what it held); MISSING if nothing
    find = light_forward if graph == "light" else lean_forward
    try:
        with torch.inference_mode(False), torch.enable_grad():
            for module in network.modules():
                forward = find(module) if graph != "autograd" or casts_weights(module) else None
                if forward is not None:
                    kept.append((module.__dict__, "forward", module.__dict__.get("forward", MISSING)))
                    module.forward = forward  # type: ignore[method-assign]
                if not casts_weights(module):
                    _alias_tensors(module, kept)
            yield
    finally:
        for table, name, value in reversed(kept):
            if value is MISSING:
                del table[name]
            else:
                table[name] = value


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
