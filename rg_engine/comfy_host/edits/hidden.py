"""The network's innermost features, h: read in each call, and put in the place of its own.

The paper's code gives the decoder a moved h in the first call only, but then hands on what each call returns, the block's
own output before it was replaced: from the second call on the decoder gets the h of the call before. ``stale`` does so too.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from ...errors import BackboneError, BoundaryError
from ...features import Backbone

CONDITIONAL = 0  # in ComfyUI's cond_or_uncond
TRANSFORMER_OPTIONS = 5  # among the arguments of BaseModel.apply_model


def hidden_path(network: Any, backbone: Backbone) -> str:
    """The module whose output is h: the last of a UNet's middle block; of a transformer, the block that is read (its stream
    of text and picture as a whole). Raises BackboneError for one whose block gives several streams."""
    middle = getattr(network, "middle_block", None)
    if middle is not None and len(middle):
        return f"middle_block.{len(middle) - 1}"
    layout = backbone.layout(backbone.taps[-1])
    if layout is not None and layout.item is not None:
        raise BackboneError(f"{backbone.taps[-1]} of {backbone.name} gives text and picture apart, and neither alone is h")
    return backbone.taps[len(backbone.taps) // 2]


class Hidden:
    """A wrapper for one model call after another (WrappersMP.APPLY_MODEL). ``seen``: the last one's conditional h, (B, ...).

    Until something is put, h is only read.
    """

    def __init__(self, path: str, *, stale: bool = False) -> None:
        self._path, self._stale = path, stale
        self._given: dict[int, Tensor] = {}  # by kind: what the next call's decoder gets
        self._rows: Tensor | None = None
        self._kinds: list[int] = []
        self._heard: dict[int, Tensor] = {}  # by kind, of the last call
        self._silent = True
        self.seen: Tensor | None = None

    def apply_model(self, executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        options = kwargs.get("transformer_options") or (args[TRANSFORMER_OPTIONS] if len(args) > TRANSFORMER_OPTIONS else {})
        self._kinds, self._silent = list(options.get("cond_or_uncond", [CONDITIONAL])), True
        module = executor.class_obj.diffusion_model.get_submodule(self._path)
        handle = module.register_forward_hook(self._hook)
        try:
            with _as_written():
                out = executor(*args, **kwargs)
        finally:
            handle.remove()
        if self._silent:
            raise BoundaryError(
                f"the model ran without its {self._path}: another node or torch.compile replaced its forward pass. Bypass "
                "that node, or fit in z"
            )
        self.seen = self._heard.get(CONDITIONAL, self.seen)
        return out

    def put(self, h: Tensor, rows: Tensor) -> None:
        """What the next call's decoder gets, (B, ...), in pictures of ``rows`` (B,)."""
        self._given, self._rows = {CONDITIONAL: h, 1 - CONDITIONAL: h}, rows

    def next_step(self) -> None:
        """After each step of the sampler: the first call's replacement is over."""
        self._given = dict(self._heard) if self._stale and self._rows is not None else {}

    def _hook(self, _module: Any, _inputs: Any, output: Any) -> Any:
        self._silent = False
        whole: Tensor = output[0] if isinstance(output, tuple) else output
        chunks = list(whole.chunk(len(self._kinds)))
        for kind, chunk in zip(self._kinds, chunks, strict=True):
            self._heard[kind] = chunk.detach().clone()
        if not self._given:
            return None
        put = torch.cat([self._put(kind, chunk) for kind, chunk in zip(self._kinds, chunks, strict=True)])
        return (put, *output[1:]) if isinstance(output, tuple) else put

    def _put(self, kind: int, own: Tensor) -> Tensor:
        if kind not in self._given:
            return own
        assert self._rows is not None
        rows = self._rows.to(own.device).view(-1, *([1] * (own.ndim - 1)))
        return torch.where(rows, self._given[kind].to(own), own)


def _as_written() -> Any:
    """A network that was compiled runs as it was written: what is compiled calls no hooks."""
    if hasattr(torch.compiler, "set_stance"):  # torch 2.6
        return torch.compiler.set_stance("force_eager")
    return contextlib.nullcontext()
