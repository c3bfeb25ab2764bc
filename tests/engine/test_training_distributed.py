"""Several processes that train one head do as one process does with the same batch.

Run as a script, this file starts two of them.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rg_engine.errors import TrainingError
from rg_engine.training.distributed import Ranks, joined

TESTS = Path(__file__).resolve().parents[1]
WAYS = (
    {"accumulate": 1, "validate_every": 2},
    {"accumulate": 2, "validate_every": 2, "noise_draws": 2, "shift": 0.2},
)


def trained(ranks: Ranks, folder: Path) -> dict:
    """Trains a head in each way; weights and history of each, and how many examples this process read."""
    from small_training import read, training

    found = {}
    for i, way in enumerate(WAYS):
        seen = []
        learner = training(
            **way, steps=3, learning_rate=1e-2, weights=ranks.rank, ranks=ranks, checkpoint=folder / f"{i}.state",
            reading=lambda draw, seen=seen: seen.append(len(draw.latents)) or read(draw),
        )  # fmt: skip
        head = learner.run()
        found[i] = {"weights": dict(head.network.state_dict()), "history": learner.history, "seen": seen}
    return found


# Shares


@pytest.mark.parametrize(("batch", "world"), [(1, 1), (8, 1), (8, 2), (12, 3), (4, 4)])
def test_the_processes_share_a_batch_evenly_and_in_order(batch, world):
    shares = [Ranks(rank=rank, world=world).share(batch) for rank in range(world)]
    assert [row for share in shares for row in share] == list(range(batch))
    assert {len(share) for share in shares} == {batch // world}


@pytest.mark.parametrize(("batch", "world"), [(5, 2), (1, 2), (8, 3)])
def test_a_batch_that_cannot_be_shared_is_refused(batch, world):
    with pytest.raises(TrainingError, match=f"a batch of {batch} can't be shared by {world} processes: make it a multiple"):
        Ranks(rank=0, world=world).share(batch)


def test_a_microbatch_that_cannot_be_shared_is_refused_before_the_training():
    from small_training import training

    with pytest.raises(TrainingError, match="a batch of 2 can't be shared by 4 processes"):
        training(batch=8, accumulate=4, ranks=Ranks(rank=0, world=4))


def test_one_process_is_the_first_of_one_and_joins_nothing(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined() as ranks:
        assert (ranks, ranks.first) == (Ranks(rank=0, world=1), True)
        assert not torch.distributed.is_initialized()
    assert not Ranks(rank=1, world=2).first


# A real group


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")
def test_two_processes_train_as_one(tmp_path):
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, __file__, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"rank {rank}.pt", weights_only=True) for rank in (0, 1))
    (alone_folder := tmp_path / "alone").mkdir()
    alone = trained(Ranks(), alone_folder)
    for i, way in enumerate(WAYS):
        one, two, whole = first[i], second[i], alone[i]
        assert one["history"] == two["history"]
        torch.testing.assert_close(one["weights"], two["weights"], rtol=0, atol=0)
        losses, wanted = (
            [value for point in each["history"] for value in point if value is not None] for each in (one, whole)
        )
        assert losses == pytest.approx(wanted, rel=1e-4)
        torch.testing.assert_close(one["weights"], whole["weights"], rtol=0, atol=2e-5)
        assert one["seen"][0] == 4 // way["accumulate"] // 2, "each process reads its own share"
    assert sorted(file.name for file in tmp_path.glob("*.state")) == ["0.state", "1.state"]


def one_of_two(rank: int, folder: Path, port: int) -> None:
    """What one process does, in the environment that torchrun gives it."""
    os.environ.update(WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    with joined() as ranks:
        results = trained(ranks, folder)
        assert torch.distributed.is_initialized()
    assert not torch.distributed.is_initialized()
    torch.save(results, folder / f"rank {ranks.rank}.pt")


if __name__ == "__main__":
    torch.optim.AdamW([torch.zeros(1)])  # its imports take seconds: once, not in each process
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    method = "fork" if sys.platform == "linux" else "spawn"
    torch.multiprocessing.start_processes(one_of_two, (Path(sys.argv[1]), port), nprocs=2, start_method=method)
