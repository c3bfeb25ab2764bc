"""The global random state, which samplers and other nodes' patches draw from."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

RandomState = tuple[Callable[[Tensor], None], Tensor]  # of a generator: what sets it, and what it is


def random_states(device: torch.device) -> list[RandomState]:
    """Those of the default generators, the CPU's and the device's."""
    sources: list[Any] = [torch] if device.type == "cpu" else [torch, getattr(torch, device.type, None)]
    return [(source.set_rng_state, source.get_rng_state()) for source in sources if hasattr(source, "get_rng_state")]


def set_random_states(states: list[RandomState]) -> None:
    for put, state in states:
        put(state)


@contextlib.contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """Leaves the global random state as it was."""
    states = random_states(device)
    try:
        yield
    finally:
        set_random_states(states)
