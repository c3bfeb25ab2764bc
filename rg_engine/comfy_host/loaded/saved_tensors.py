"""What other nodes do inside the network while autograd is on: their patches and layers were written for inference.

They write in place to tensors that backward needs, and their own weights are inference tensors, which autograd refuses to
keep. ``torch.autograd.graph.allow_mutation_on_saved_tensors`` is meant for this, but takes tensors for one another: it knows
them by object id, address and version, which a new tensor may share with one that was copied and is gone. Backward then
now and then works with another layer's activations (seen in PyTorch 2.15: gradients off by 30-75% in one run of a dozen).
"""

from __future__ import annotations

import contextlib
import contextvars
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
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


class _NoInferenceTensors(TorchFunctionMode):
    """Functions get ordinary tensors in the place of inference tensors."""

    def __init__(self) -> None:
        super().__init__()
        self._ordinary: dict[int, tuple[Tensor, Tensor]] = {}  # by id; the tensor is held, so that its id stays its own

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*map(self._plain, args), **{name: self._plain(value) for name, value in (kwargs or {}).items()})

    def _plain(self, value: Any) -> Any:
        if type(value) in (list, tuple):
            return type(value)(map(self._plain, value))
        if type(value) not in (Tensor, nn.Parameter) or not value.is_inference():
            return value
        if id(value) not in self._ordinary:
            self._ordinary[id(value)] = value, ordinary(value)
        return self._ordinary[id(value)][1]


_others: contextvars.ContextVar[_NoInferenceTensors | None] = contextvars.ContextVar("others", default=None)


@contextlib.contextmanager
def beside_other_nodes() -> Iterator[None]:
    """A scope in which tensors that were saved for backward may be written to (backward sees them as they were), and
    functions take inference tensors."""
    mode, functions = _CopyBeforeWrite(), _NoInferenceTensors()
    before = _others.set(functions)
    try:
        with mode, functions, torch.autograd.graph.saved_tensors_hooks(mode.pack, lambda saved: saved.tensor):
            yield
    finally:
        _others.reset(before)


def other_nodes() -> _NoInferenceTensors | None:
    """Inside of :func:`beside_other_nodes`, what layers that run again in backward have to run in, where it is not on."""
    return _others.get()


def ordinary(tensor: Tensor) -> Tensor:
    """A tensor that is no inference tensor, over the same storage, and of the same class (other nodes have some of their own
    for packed weights, whose ``shape`` may not be their size)."""
    alias = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    alias.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())
    return alias if type(tensor) is nn.Parameter else alias.as_subclass(type(tensor))


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
