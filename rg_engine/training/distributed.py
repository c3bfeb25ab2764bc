"""Several processes that train one head: what torchrun started, or one process by itself."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import TrainingError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process's place among ``world`` processes."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, batch: int) -> range:
        """The rows of a global batch that are this process's. Raises TrainingError if they can't be shared evenly."""
        if batch % self.world:
            raise TrainingError(f"a batch of {batch} can't be shared by {self.world} processes: make it a multiple")
        each = batch // self.world
        return range(self.rank * each, (self.rank + 1) * each)

    def wrapped(self, module: nn.Module) -> nn.Module:
        """The module with its gradients averaged over the processes."""
        return nn.parallel.DistributedDataParallel(module) if self.world > 1 else module

    def mean(self, value: Tensor) -> Tensor:
        if self.world > 1:
            dist.all_reduce(value)
            value = value / self.world
        return value


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """The group that torchrun made (NCCL where each process has its own GPU, else gloo), left again at the end."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Ranks()
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    gpus = torch.cuda.device_count()
    if gpus > local:
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if gpus >= world else "gloo")
    try:
        yield Ranks(rank=dist.get_rank(), world=world)
    finally:
        dist.destroy_process_group()
