"""In-place writes to tensors that backward needs.

``torch.autograd.graph.allow_mutation_on_saved_tensors`` is meant for this, but takes tensors for one another: it knows
them by object id, address and version, which a new tensor may share with one that was copied and is gone. Backward then
now and then works with another layer's activations (seen in PyTorch 2.15: gradients off by 30-75% in one run of a dozen).
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class _Saved:
    """What backward will get; as it holds the tensor's memory, no other one can have its address meanwhile.

    Detached, since an operation that saves its own output would hold itself through it, for ever.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()


class _CopyBeforeWrite(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self._saved: dict[int, weakref.WeakSet[_Saved]] = {}  # by address

    def pack(self, tensor: Tensor) -> _Saved:
        saved = _Saved(tensor)
        self._saved.setdefault(_address(tensor), weakref.WeakSet()).add(saved)
        return saved

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for position, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            given = args[position] if position < len(args) else kwargs.get(argument.name)
            for written in given if isinstance(given, (list, tuple)) else (given,):
                if isinstance(written, Tensor):
                    self._copy(written)
        return func(*args, **kwargs)

    def _copy(self, written: Tensor) -> None:
        for saved in self._saved.pop(_address(written), ()):
            saved.tensor = saved.tensor.detach().clone()


@contextlib.contextmanager
def in_place_allowed() -> Iterator[None]:
    """A scope in which tensors that were saved for backward may be written to; backward sees them as they were."""
    mode = _CopyBeforeWrite()
    with mode, torch.autograd.graph.saved_tensors_hooks(mode.pack, lambda saved: saved.tensor):
        yield


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
