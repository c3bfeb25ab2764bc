"""Reads a network's features while it runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import BackboneError
from .contract import Backbone


class Enough(BaseException):
    """All taps have been heard, and the rest of the pass is not wanted."""


class FeatureTap:
    """Context manager: forward hooks on a backbone's taps, gone on exit whatever happened. A network that was compiled
    (torch.compile) runs as it was written meanwhile: what is compiled calls no hooks, and keeps no graph.

    After a forward pass :meth:`take` gives its features and emb and forgets them::

        with FeatureTap(unet, backbone) as tap:
            unet(z, timestep, context=context)
            features, emb = tap.take()  # a list of (B, C_i, H_i, W_i), and (B, E) or None

    Between the last tap and :meth:`take` no graph is recorded: nothing is read there. With ``end`` a transformer's pass ends
    at the last tap, with :class:`Enough`.
    """

    def __init__(self, network: nn.Module, backbone: Backbone, *, end: bool = False) -> None:
        self._network = network
        self._backbone = backbone
        self._end = end and backbone.is_transformer
        self._handles: list[RemovableHandle] = []
        self._found: dict[str, Tensor] = {}
        self._latent: tuple[int, ...] = ()
        self._lengths: dict[str, int] = {}  # of the outputs of modules that count tokens
        self._graph: bool | None = None  # whether one was recorded up to the last tap
        self._uncompiled = contextlib.ExitStack()

    def __enter__(self) -> FeatureTap:
        self.attach()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.detach()

    def attach(self) -> None:
        backbone = self._backbone
        try:
            if hasattr(torch.compiler, "set_stance"):  # torch 2.6
                self._uncompiled.enter_context(torch.compiler.set_stance("force_eager"))
            self._handles.append(self._network.register_forward_pre_hook(self._begin, with_kwargs=True))
            for path in {layout.counted for layout in backbone.layouts if layout is not None and layout.counted}:
                self._hook(path, self._count(path))
            for path in self._paths:
                self._hook(path, self._catch(path))
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        self._resume_graph()
        self._uncompiled.close()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._found.clear()

    @property
    def heard(self) -> bool:
        """Whether the network has run, as far as can be told."""
        return bool(self._found)

    def take(self) -> tuple[list[Tensor], Tensor | None]:
        """Features in tap order and emb (without a graph; None where the network's own is not used) of the last forward
        pass."""
        self._resume_graph()
        missed = [path for path in self._paths if path not in self._found]
        if missed:
            raise BackboneError(
                f"the model ran without its {missed[0]} ({len(missed)} taps silent): another node or torch.compile replaced "
                "its forward pass. Bypass that node for the guided sampler"
            )
        features = [self._found[path] for path in self._backbone.taps]
        emb = self._found[self._backbone.emb_tap].detach() if self._backbone.emb_tap else None
        self._found.clear()
        return features, emb

    @property
    def _paths(self) -> tuple[str, ...]:
        """Of all modules that are listened to."""
        emb_tap = self._backbone.emb_tap
        return self._backbone.taps if emb_tap is None else (*self._backbone.taps, emb_tap)

    def _hook(self, path: str, hook: Callable[..., None]) -> None:
        self._handles.append(self._network.get_submodule(path).register_forward_hook(hook))

    def _begin(self, _network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._resume_graph()
        self._found.clear()
        self._latent = tuple((args[0] if args else kwargs["x"]).shape)

    def _count(self, path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: object, output: Tensor) -> None:
            self._lengths[path] = output.shape[1]

        return hook

    def _catch(self, path: str) -> Callable[..., None]:
        layout = self._backbone.layout(path) if path in self._backbone.taps else None

        def hook(_module: nn.Module, _args: object, output: Any) -> None:
            self._found[path] = output if layout is None else layout.read(output, self._latent, self._lengths)
            if len(self._found) < len(self._paths):
                return
            if self._end:
                raise Enough
            if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
                self._graph = True
                torch.set_grad_enabled(False)

        return hook

    def _resume_graph(self) -> None:
        if self._graph:
            torch.set_grad_enabled(True)
        self._graph = None
