"""What is kept between runs, by a fingerprint of everything that it follows from."""

from __future__ import annotations

import hashlib
import weakref
from collections import OrderedDict
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

#: What changes from run to run and determines nothing.
IGNORED = {"uuid", "sample_sigmas", "readout_guidance"}
Value = TypeVar("Value")


class Kept(Generic[Value]):
    """The last few values, by fingerprint."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept: OrderedDict[str, tuple[Value, list[Any]]] = OrderedDict()

    def find(self, fingerprint: Fingerprint) -> Value | None:
        """The value of this fingerprint; one that was made with an object that is gone does not count."""
        found = self._kept.get(fingerprint.digest)
        if found is None or any(same() is not now for same, now in zip(found[1], fingerprint.objects, strict=False)):
            return None
        self._kept.move_to_end(fingerprint.digest)
        return found[0]

    def keep(self, fingerprint: Fingerprint, value: Value) -> None:
        references = [_reference(each) for each in fingerprint.objects]
        self._kept[fingerprint.digest] = (value, references)
        self._kept.move_to_end(fingerprint.digest)
        while len(self._kept) > self._most:
            self._kept.popitem(last=False)


class Fingerprint:
    """A digest of nested values: tensors by content, plain values as they are, other objects by identity."""

    def __init__(self, *values: Any) -> None:
        self.objects: list[Any] = []
        self._hash = hashlib.blake2b(digest_size=20)
        for value in values:
            self._add(value)
        self.digest = self._hash.hexdigest()

    def _add(self, value: Any) -> None:
        if isinstance(value, Tensor):
            self._tag(f"tensor {tuple(value.shape)} {value.dtype}")
            plain = value.detach().to("cpu").contiguous()
            self._hash.update(plain.flatten().view(torch.uint8).numpy().tobytes())
        elif value is None or isinstance(value, (bool, int, float, str, bytes, complex)):
            self._tag(f"{type(value).__name__} {value!r}")
        elif isinstance(value, dict):
            self._tag(f"dict {len(value)}")
            for key in value:
                if key not in IGNORED:
                    self._add(key)
                    self._add(value[key])
        elif isinstance(value, (list, tuple, set, frozenset)):
            self._tag(f"list {len(value)}")
            for item in value:
                self._add(item)
        elif hasattr(value, "cond") and type(value).__module__ == "comfy.conds":
            self._tag(type(value).__name__)
            self._add(value.cond)
        else:
            self._tag(f"object {type(value).__name__}")
            self._hash.update(str(id(value)).encode())
            self.objects.append(value)

    def _tag(self, text: str) -> None:
        self._hash.update(text.encode() + b"\0")


def _reference(value: Any) -> Any:
    """A weak reference, or where there can be none (a bound method, which is made anew each time) a strong one."""
    try:
        return weakref.ref(value)
    except TypeError:
        return lambda: value
