"""Gradients through a loaded ComfyUI model, without copying its weights.

ComfyUI runs nodes in inference mode, and weights loaded there are inference tensors, which autograd refuses to keep. For
the time of one pass a :class:`GradientScope` replaces

* each inference parameter by an ordinary tensor over the same storage (nothing is copied), and
* the forward of layers that make their weights when they run (offloaded, dynamic, quantised or patched ones), or that take
  less memory otherwise (:mod:`.frozen_layers`, :mod:`.run_again`),

and, of a transformer, ComfyUI's choice of kernels: those that have a backward where there are some, and one for the rest
(:mod:`.kitchen`). Everything is as before when the scope ends, also after an error.
"""

from __future__ import annotations

import contextlib
from typing import Any, Literal

import comfy.model_management
import torch
from torch import Tensor, nn

from ...features import Backbone
from .frozen_layers import casts_weights, frozen_forward, is_known, light_forward, may_be_light
from .kitchen import kernels_with_backward
from .run_again import block_again
from .saved_tensors import ordinary

#: What is kept for backward. full: what autograd keeps, but no weights that were cast; light: about a third of it, at the
#: cost of running transformer blocks twice.
Graph = Literal["full", "light"]
MISSING = object()


class GradientScope:
    """Context manager: inside, autograd is on and ``network`` can be differentiated with respect to its inputs.

    It can be entered again and again, for pass after pass of one run; what it knows of the network's structure is gathered
    once. ``backbone`` tells which blocks can run again, where they are not a UNet's.
    """

    def __init__(self, network: nn.Module, graph: Graph = "full", backbone: Backbone | None = None) -> None:
        self.network, self.graph = network, graph
        self.writes = False  # inside: whether the network, or other nodes' code in its layers, may write to what is kept
        self._transformer = backbone is not None and backbone.is_transformer
        again = backbone.blocks if backbone is not None and graph == "light" else ()
        self._again = {network.get_submodule(path) for path in again}
        self._modules = [m for m in network.modules() if m._parameters or m._buffers or may_be_light(m) or m in self._again]
        self._aliases: dict[int, Tensor] = {}  # by the id of the parameter; both live as long as the run
        self._kept: list[tuple[dict[str, Any], str, Any]] = []  # (table, name, what it held); MISSING if nothing
        self._modes = contextlib.ExitStack()

    def __enter__(self) -> GradientScope:
        self.writes = self._transformer
        forward_of = light_forward if self.graph == "light" else frozen_forward
        try:
            self._modes.enter_context(torch.inference_mode(False))
            self._modes.enter_context(torch.enable_grad())
            self._modes.enter_context(kernels_with_backward(self._transformer))
            if hasattr(comfy.model_management, "in_training"):  # newer ComfyUIs choose their operations by it
                self._replace(vars(comfy.model_management), "in_training", True)
            for module in self._modules:
                self.writes |= bool("forward" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks)
                casts = casts_weights(module)
                forward = block_again(module) if module in self._again else forward_of(module, casts)
                if forward is not None:
                    self._replace(module.__dict__, "forward", forward)
                if not (casts and is_known(module)):
                    for table in filter(None, (module._parameters, module._buffers)):
                        self._alias(table, as_parameter=table is module._parameters)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for table, name, value in reversed(self._kept):
            if value is MISSING:
                del table[name]
            else:
                table[name] = value
        self._kept.clear()
        self._modes.close()

    def _alias(self, table: Any, as_parameter: bool) -> None:
        """Replace a module's inference tensors by ordinary ones over the same storages."""
        for name, tensor in table.items():
            if tensor is None or not tensor.is_inference():
                continue
            alias = self._aliases.get(id(tensor))
            if alias is None or alias.data_ptr() != tensor.data_ptr() or alias.dtype != tensor.dtype:
                if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:  # made of other tensors
                    continue
                alias = nn.Parameter(ordinary(tensor), requires_grad=False) if as_parameter else ordinary(tensor)
                alias.__dict__.update(tensor.__dict__)  # how it is packed, and LoRAs on it
                self._aliases[id(tensor)] = alias
            self._replace(table, name, alias)

    def _replace(self, table: dict[str, Any], name: str, value: Any) -> None:
        self._kept.append((table, name, table.get(name, MISSING)))
        table[name] = value
