"""The training loop of heads. Several heads can learn from the same features at once."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..errors import ReadoutGuidanceError
from ..heads import AggregationNetwork, HeadSpec, ReadoutHead

#: features (list of (B, C_i, h_i, w_i)), emb (B, E), and whatever the losses compare with
Batch = tuple[list[Tensor], Tensor, Any]


@dataclasses.dataclass(kw_only=True)
class HeadTraining:
    """One head in training: ``loss(readout, truth)`` is what it minimises."""

    spec: HeadSpec
    network: AggregationNetwork
    loss: Callable[[Tensor, Any], Tensor]
    name: str


def train_heads(
    trainings: Sequence[HeadTraining],
    batch: Callable[[int], Batch],
    *,
    size: tuple[int, int],
    steps: int,
    learning_rate: float = 1e-3,
    checkpoint: Path | None = None,
    ema: float = 0.99,
    report: Callable[[int, list[float]], None] | None = None,
    checkpoint_every_s: float = 60.0,
) -> list[ReadoutHead]:
    """Train heads with AdamW (cosine decay after a short warm-up); returns their moving averages.

    Args:
        batch: gives the batch of a step; the same for the same step, so that a resumed training repeats nothing.
        size: latent cells (H, W) of the readouts.
        checkpoint: resumes from it if it is there.
        report: called with the step and each head's loss.
    Raises: ReadoutGuidanceError if a loss is not finite; the last checkpoint stays.
    """
    averages = [AveragedModel(t.network, multi_avg_fn=get_ema_multi_avg_fn(ema)) for t in trainings]
    optimisers = [torch.optim.AdamW(t.network.parameters(), lr=learning_rate, weight_decay=0.0) for t in trainings]
    parts = [module for group in ([t.network for t in trainings], averages, optimisers) for module in group]
    start = _resume(checkpoint, parts)
    for training in trainings:
        training.network.train().requires_grad_(True)
    saved = time.monotonic()
    for step in range(start, steps):
        rate = learning_rate * min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
        features, emb, truth = batch(step)
        losses = []
        for training, optimiser, average in zip(trainings, optimisers, averages, strict=True):
            for group in optimiser.param_groups:
                group["lr"] = rate
            readout = training.network(features, emb if training.spec.use_emb else None, size)
            loss = training.loss(readout, truth)
            if not torch.isfinite(loss):
                raise ReadoutGuidanceError(
                    f"the loss of {training.name!r} is {loss.item()} at step {step}: "
                    "lower the learning rate or check the data"
                )
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            average.update_parameters(training.network)
            losses.append(loss.item())
        if report is not None:
            report(step, losses)
        if checkpoint is not None and (time.monotonic() - saved > checkpoint_every_s or step == steps - 1):
            _save(checkpoint, parts, step + 1)
            saved = time.monotonic()
    done = []
    for training, average in zip(trainings, averages, strict=True):
        network = cast(AggregationNetwork, average.module.eval().requires_grad_(False))
        spec = dataclasses.replace(training.spec, training={**training.spec.training, "steps": steps})
        done.append(ReadoutHead(network=network, spec=spec, name=training.name))
    return done


def log_losses(path: Path, every: int = 50) -> Callable[[int, list[float]], None]:
    """A report that appends a JSON line every so many steps."""
    recent: list[list[float]] = []

    def report(step: int, losses: list[float]) -> None:
        recent.append(losses)
        if (step + 1) % every == 0:
            means = [round(sum(column) / len(recent), 5) for column in zip(*recent, strict=True)]
            recent.clear()
            with open(path, "a", encoding="utf-8") as log:
                log.write(json.dumps({"step": step + 1, "loss": means}) + "\n")

    return report


def _resume(checkpoint: Path | None, parts: Sequence[Any]) -> int:
    if checkpoint is None or not checkpoint.exists():
        return 0
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    for part, value in zip(parts, state["parts"], strict=True):
        part.load_state_dict(value)
    return int(state["step"])


def _save(checkpoint: Path, parts: Sequence[Any], step: int) -> None:
    partial = checkpoint.with_suffix(".partial")
    torch.save({"parts": [part.state_dict() for part in parts], "step": step}, partial)
    os.replace(partial, checkpoint)
