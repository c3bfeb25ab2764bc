"""The loaded model as the sampler calls it, differentiable: each call keeps its input and runs again in backward."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import comfy.model_management
import comfy.model_patcher
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from torch import Tensor

from ..guided.attention import ATTENTION
from ..loaded.frozen_layers import plain
from ..loaded.gradient_scope import GradientScope, Graph
from ..loaded.model import known_backbone
from ..loaded.saved_tensors import beside_other_nodes
from .rerun import Stage

log = logging.getLogger("readout_guidance")
KEY = "readout_guidance_optimized"
#: Inputs of model calls are kept on the device up to this share of its free memory.
KEPT_SHARE = 1 / 16


class Network:
    """A guider, and its networks (the model's and those of ControlNets) for the time of one run.

    Called as the sampler calls it: x (B, C, H, W) and sigma (B,) to the denoised latent.
    """

    def __init__(self, guider: Any, options: dict[str, Any], graph: Graph, calls: int, memory: float = 0.0) -> None:
        """calls: of one run; memory: bytes that a call with a graph takes beside the weights."""
        self._guider, self._graph = guider, graph
        self._beside = list(guider.loaded_models)  # ModelPatchers that were loaded for the run, ControlNets' among them
        self._modules = [guider.inner_model.diffusion_model, *(each.model for each in self._beside)]
        self._make_scopes()
        self._transformer = options.get("transformer_options", {})
        self._calls, self._memory = calls, memory
        self._loaded_bytes = guider.model_patcher.loaded_size()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._guider, name)

    def __call__(self, x: Tensor, sigma: Tensor, model_options: dict[str, Any] | None = None, seed: Any = None) -> Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        level = sigma.detach().clone()

        def run(x: Tensor) -> Tensor:
            return self._guider(x, level, model_options=model_options or {}, seed=seed)

        def with_graph(x: Tensor) -> Tensor:
            comfy.model_management.throw_exception_if_processing_interrupted()
            return self._guider(x, level, model_options=self.with_graph(model_options or {}), seed=seed)

        return Stage(
            run, self.scope, with_graph=with_graph, ready=self.load, lighten=self.lighten, on_cpu=self._short_of_memory(x)
        )(x)

    def with_graph(self, options: dict[str, Any]) -> dict[str, Any]:
        """Model options for a call that has a graph."""
        options = comfy.model_patcher.create_model_options_clone(options)
        add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, self._apply_model, options, is_model_options=True)
        return options

    def load(self) -> None:
        """Load the model again, if decoding pushed it, or a part of it, out."""
        patcher = self._guider.model_patcher
        loaded = [each.model.model for each in comfy.model_management.current_loaded_models if each.model is not None]
        there = any(model is patcher.model for model in loaded) and patcher.loaded_size() >= self._loaded_bytes
        if patcher.load_device.type != "cpu" and not there:
            comfy.model_management.load_models_gpu([patcher, *self._beside], memory_required=self._memory)

    def lighten(self) -> bool:
        """The light graph from now on; False if it is on."""
        if self._graph == "light":
            return False
        log.warning("Out of memory: the light graph is used from now on, which takes about a quarter longer.")
        self._graph = "light"
        self._make_scopes()
        comfy.model_management.soft_empty_cache()
        return True

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        """In which calls have a graph. Other nodes' code in the network, and ControlNets, may write in place there."""
        with contextlib.ExitStack() as stack:
            for scope in self._scopes:
                stack.enter_context(scope)
            patched = any(map(self._transformer.get, ("patches", "patches_replace")))
            if patched or self._scopes[1:] or self._scopes[0].writes:
                stack.enter_context(beside_other_nodes())
            yield

    def _make_scopes(self) -> None:
        self._scopes = [GradientScope(module, self._graph, known_backbone(module)) for module in self._modules]

    def _short_of_memory(self, x: Tensor) -> bool:
        kept = x.numel() * x.element_size() * self._calls
        return x.device.type != "cpu" and kept > KEPT_SHARE * comfy.model_management.get_free_memory(x.device)

    def _apply_model(
        self, executor: Any, x: Tensor, t: Tensor, c_concat: Any = None, c_crossattn: Any = None, control: Any = None,
        transformer_options: dict[str, Any] | None = None, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        """The wrapper around BaseModel.apply_model: ordinary tensors, and attention that has a backward."""
        options = {**(transformer_options or {}), "optimized_attention_override": ATTENTION[self._graph]}
        return executor(x, plain(t), plain(c_concat), plain(c_crossattn), plain(control), options, **plain(kwargs))
