"""What other nodes do inside the network while autograd is on: their patches and layers were written for inference.

They write in place to tensors that backward needs, and their own weights are inference tensors, which autograd refuses to
keep. ``torch.autograd.graph.allow_mutation_on_saved_tensors`` is meant for this, but takes tensors for one another: it knows
them by object id, address and version, which a new tensor may share with one that was copied and is gone. Backward then
now and then works with another layer's activations (seen in PyTorch 2.15: gradients off by 30-75% in one run of a dozen).
Writes are seen where Python makes them, which costs a quarter of what looking at every operation below it does.
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


class _Saved:
    """What backward will get; as it holds the tensor's memory, no other one can have its address meanwhile.

    Detached, since an operation that saves its own output would hold itself through it, for ever.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()


class _BesideOthers(TorchFunctionMode):
    """Python code that writes to a tensor gets through, and what backward has kept of it is copied first; and functions get
    ordinary tensors in the place of inference tensors."""

    def __init__(self) -> None:
        super().__init__()
        self._saved: dict[int, weakref.WeakSet[_Saved]] = {}  # by address
        self._ordinary: dict[int, tuple[Tensor, Tensor]] = {}  # by id; the tensor is held, so that its id stays its own

    def pack(self, tensor: Tensor) -> _Saved:
        saved = _Saved(tensor)
        self._saved.setdefault(_address(tensor), weakref.WeakSet()).add(saved)
        return saved

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if args and (_writes(getattr(func, "__name__", "")) or kwargs.get("inplace")):
            self._copy(args[0])
        if kwargs.get("out") is not None:
            self._copy(kwargs["out"])
        return func(*map(self._plain, args), **{name: self._plain(value) for name, value in kwargs.items()})

    def _copy(self, written: Any) -> None:
        for tensor in written if isinstance(written, (list, tuple)) else (written,):
            for saved in self._saved.pop(_address(tensor), ()) if isinstance(tensor, Tensor) else ():
                saved.tensor = saved.tensor.detach().clone()

    def _plain(self, value: Any) -> Any:
        if type(value) in (list, tuple):
            return type(value)(map(self._plain, value))
        if type(value) not in (Tensor, nn.Parameter) or not value.is_inference():
            return value
        if id(value) not in self._ordinary:
            self._ordinary[id(value)] = value, ordinary(value)
        return self._ordinary[id(value)][1]


def _writes(name: str) -> bool:
    """Whether a function of torch of this name writes to its first argument: add_, __setitem__."""
    return name.endswith("_") and (not name.endswith("__") or name == "__setitem__" or name.startswith("__i"))


_beside: contextvars.ContextVar[bool] = contextvars.ContextVar("beside", default=False)


@contextlib.contextmanager
def beside_other_nodes(on: bool = True) -> Iterator[None]:
    """A scope in which tensors that were saved for backward may be written to (backward sees them as they were), and
    functions take inference tensors."""
    if not on:
        yield
        return
    mode = _BesideOthers()
    before = _beside.set(True)
    try:
        with mode, torch.autograd.graph.saved_tensors_hooks(mode.pack, lambda saved: saved.tensor):
            yield
    finally:
        _beside.reset(before)


def is_beside_other_nodes() -> bool:
    """Whether :func:`beside_other_nodes` is on: what runs again in backward, where it is not, has to turn it on."""
    return _beside.get()


def ordinary(tensor: Tensor) -> Tensor:
    """A tensor that is no inference tensor, over the same storage, and of the same class (other nodes have some of their own
    for packed weights, whose ``shape`` may not be their size)."""
    alias = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    alias.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())
    return alias if type(tensor) in (Tensor, nn.Parameter) else alias.as_subclass(type(tensor))


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
