"""Reads a network's features while it runs."""

from __future__ import annotations

import contextlib
from types import TracebackType

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import BackboneError
from .backbones import Backbone


class FeatureTap:
    """Context manager: forward hooks on a backbone's taps, gone on exit whatever happened. A network that was compiled
    (torch.compile) runs as it was written meanwhile: what is compiled calls no hooks, and keeps no graph.

    After a forward pass :meth:`take` gives its features and emb and forgets them::

        with FeatureTap(unet, backbone) as tap:
            unet(z, timestep, context=context)
            features, emb = tap.take()  # a list of (B, C_i, H_i, W_i), and (B, E)
    """

    def __init__(self, network: nn.Module, backbone: Backbone) -> None:
        self._network = network
        self._backbone = backbone
        self._handles: list[RemovableHandle] = []
        self._found: dict[str, Tensor] = {}
        self._uncompiled = contextlib.ExitStack()

    def __enter__(self) -> FeatureTap:
        self.attach()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.detach()

    def attach(self) -> None:
        try:
            if hasattr(torch.compiler, "set_stance"):  # torch 2.6
                self._uncompiled.enter_context(torch.compiler.set_stance("force_eager"))
            for path in (*self._backbone.taps, self._backbone.emb_tap):
                module = self._network.get_submodule(path)
                self._handles.append(module.register_forward_hook(self._catch(path)))
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        self._uncompiled.close()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._found.clear()

    def take(self) -> tuple[list[Tensor], Tensor]:
        """Features in tap order and emb (without a graph) of the last forward pass."""
        missed = [path for path in (*self._backbone.taps, self._backbone.emb_tap) if path not in self._found]
        if missed:
            raise BackboneError(
                f"the model ran without its {missed[0]} ({len(missed)} taps silent): another node or torch.compile replaced "
                "its forward pass. Bypass that node for the guided sampler"
            )
        features = [self._found[path] for path in self._backbone.taps]
        emb = self._found[self._backbone.emb_tap].detach()
        self._found.clear()
        return features, emb

    def _catch(self, path: str):
        def hook(_module: nn.Module, _args: object, output: Tensor) -> None:
            self._found[path] = output

        return hook
