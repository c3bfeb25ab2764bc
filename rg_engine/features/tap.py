"""Reads a network's features while it runs."""

from __future__ import annotations

from types import TracebackType

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import BackboneError
from .backbones import Backbone


class FeatureTap:
    """Context manager: forward hooks on a backbone's taps, gone on exit whatever happened.

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

    def __enter__(self) -> FeatureTap:
        self.attach()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.detach()

    def attach(self) -> None:
        try:
            for path in (*self._backbone.taps, self._backbone.emb_tap):
                module = self._network.get_submodule(path)
                self._handles.append(module.register_forward_hook(self._catch(path)))
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
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
