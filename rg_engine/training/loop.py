"""The training loop of a head: features come without a graph, only the head learns."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..errors import TrainingError
from ..heads import ReadoutHead
from ..heads.head import Network
from .checkpoint import load_checkpoint, save_checkpoint
from .data.draws import Draw, KeptFeatures, Read, Reading, draw_step, draw_validation
from .data.examples import Examples
from .distributed import Ranks
from .lessons import Lesson
from .settings import TrainingSettings

WARM_UP = 50
CHECKPOINT_EVERY_S = 60.0


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Progress:
    """A step's news. validation: the loss of the average on the examples kept back, at steps that validate.

    shown: then a few readouts (n, D, h, w) and their truth, at the same times.
    """

    step: int
    steps: int
    loss: float
    validation: float | None = None
    shown: tuple[Tensor, Tensor | None] | None = None


class HeadTraining:
    """One head in training; :meth:`run` trains it, :meth:`best` gives what it has become so far.

    Args:
        head: with fresh weights; its network learns.
        read: gives the frozen model's features of a draw. device: where the head learns.
        checkpoint: goes on from it if it is there, with the same result as without the break, and writes it.
    """

    def __init__(
        self, head: ReadoutHead, lesson: Lesson, examples: Examples, read: Read, settings: TrainingSettings, *,
        device: torch.device | str = "cpu", checkpoint: Path | None = None, ranks: Ranks | None = None,
    ) -> None:  # fmt: skip
        self._head, self._lesson, self._settings, self._ranks = head, lesson, settings, ranks or Ranks()
        self._ranks.share(settings.batch // settings.accumulate)
        share = settings.validation_share if settings.validate_every else 0.0
        self._learned, self._kept_back = examples.split(share)
        self._read = KeptFeatures(read) if settings.noise_draws else read
        self._checkpoint = checkpoint
        self._device = torch.device(device)
        network = head.network.to(self._device).train().requires_grad_(True)
        self._average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(settings.ema))
        self._optimiser = torch.optim.AdamW(network.parameters(), lr=settings.learning_rate, weight_decay=0.0)
        self._scaler = torch.amp.GradScaler(self._device.type, enabled=settings.precision == "fp16")
        self._losses = _Losses(head, lesson)
        self._best: dict[str, Tensor] | None = None
        self._best_loss, self._without_better = math.inf, 0
        self._step = 0
        self.history: list[tuple[int, float, float | None]] = []  # step, loss, validation

    def run(self, report: Callable[[Progress], None] | None = None) -> ReadoutHead:
        """Train to the end, or until ``patience`` is spent. Raises TrainingError if a loss is not finite or the disk full.

        What ``report`` raises ends it too; :meth:`best` stays as it was at the last step, the checkpoint as it was written.
        """
        settings = self._settings
        self._resume()
        model = self._ranks.wrapped(self._losses)
        saved = time.monotonic()
        while not self._finished:
            loss = self._learn(model, draw_step(self._learned, settings, self._step))
            self._step += 1
            validation, shown = None, None
            if self._kept_back is not None and (self._step % settings.validate_every == 0 or self._step == settings.steps):
                validation, shown = self._validate(draw_validation(self._kept_back, settings))
            self.history.append((self._step, loss, validation))
            if self._finished or time.monotonic() - saved > CHECKPOINT_EVERY_S:
                self._save()
                saved = time.monotonic()
            if report is not None:
                report(Progress(step=self._step, steps=settings.steps, loss=loss, validation=validation, shown=shown))
        return self.best()

    @property
    def _finished(self) -> bool:
        settings = self._settings
        return self._step >= settings.steps or 0 < settings.patience <= self._without_better

    def best(self) -> ReadoutHead:
        """The average of the weights: at the best validation, or as it is now; frozen and on the CPU."""
        network = cast(Network, copy.deepcopy(self._average.module).cpu())
        if self._best is not None:
            network.load_state_dict(self._best)
        settings = {key: value for key, value in dataclasses.asdict(self._settings).items() if key != "timestep_convention"}
        training = {**self._head.spec.training, **settings, "steps": self._step, "examples": len(self._learned)}
        spec = dataclasses.replace(
            self._head.spec, training=training, timestep_convention=self._settings.timestep_convention
        )
        return ReadoutHead(network=network, spec=spec, name=self._head.name)

    def _learn(self, model: nn.Module, draw: Draw) -> float:
        """One optimiser step; returns the loss of the whole batch."""
        settings, optimiser = self._settings, self._optimiser
        rate = min(1.0, (self._step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * self._step / settings.steps))
        for group in optimiser.param_groups:
            group["lr"] = settings.learning_rate * rate
        optimiser.zero_grad(set_to_none=True)
        micro = settings.batch // settings.accumulate
        losses = []
        for k in range(settings.accumulate):
            rows = [k * micro + row for row in self._ranks.share(micro)]
            mine = draw.rows(rows)
            reading = self._read(mine).on(self._device)
            last = k + 1 == settings.accumulate
            with contextlib.nullcontext() if last or self._ranks.world == 1 else model.no_sync():  # type: ignore[operator]
                with _autocast(settings.precision, self._device):
                    loss = model(reading, mine.truth, self._learned.cells).mean()
                self._scaler.scale(loss / settings.accumulate).backward()
            losses.append(loss.detach())
        loss = self._ranks.mean(torch.stack(losses).mean())
        if not torch.isfinite(loss):
            raise TrainingError(
                f"the loss of {self._head.name!r} is {loss.item()} at step {self._step}: lower the learning rate, or "
                f"look at the data{'. The last checkpoint is as it was' if self._checkpoint is not None else ''}"
            )
        slopes = [p.grad.abs().max() for p in self._head.network.parameters() if p.grad is not None]
        if not self._scaler.is_enabled() and not torch.isfinite(torch.stack(slopes)).all():  # the scaler skips such steps
            raise TrainingError(
                f"the gradient of {self._head.name!r} is not finite at step {self._step}: lower the learning rate, or "
                "look at the data"
            )
        self._scaler.step(optimiser)
        self._scaler.update()
        self._average.update_parameters(self._head.network)
        return loss.item()

    @torch.no_grad()
    def _validate(self, draw: Draw) -> tuple[float, tuple[Tensor, Tensor | None]]:
        """The average's loss on the examples kept back; keeps the average if it is the best so far."""
        network = cast(Network, self._average.module)
        average = dataclasses.replace(self._head, network=network)
        losses, shown = [], None
        micro = self._settings.batch // self._settings.accumulate
        for first in range(0, len(draw.latents), micro):
            part = draw.rows(range(first, min(first + micro, len(draw.latents))))
            readouts = _read_head(average, self._read(part).on(self._device), part.latents.shape[1], self._learned.cells)
            losses.append(self._lesson.loss(readouts, _on(part.truth, readouts)))
            shown = shown or (readouts[:4, 0].cpu(), None if part.truth is None else part.truth[:4])
        network.train()
        loss = torch.cat(losses).mean().item()
        self._without_better += 1
        if loss < self._best_loss:
            self._best_loss, self._without_better = loss, 0
            self._best = {key: value.detach().cpu().clone() for key, value in network.state_dict().items()}
        assert shown is not None
        return loss, shown

    def _named(self) -> dict[str, Any]:
        """What a checkpoint must agree in."""
        facts = {
            "kind": self._head.spec.kind,
            "examples": len(self._learned),
            "maps": list(self._head.spec.feature_channels),
            "weights": sum(parameter.numel() for parameter in self._head.network.parameters()),
        }
        return {**facts, **dataclasses.asdict(self._settings)}

    def _save(self) -> None:
        if self._checkpoint is None or not self._ranks.first:
            return
        state = {
            "network": self._head.network,
            "average": self._average,
            "optimiser": self._optimiser,
            "scaler": self._scaler,
        }
        plain = {
            "step": self._step, "best": self._best, "best_loss": self._best_loss, "without_better": self._without_better,
            "history": self.history, "settings": self._named(),
        }  # fmt: skip
        save_checkpoint(self._checkpoint, {**{key: part.state_dict() for key, part in state.items()}, **plain})

    def _resume(self) -> None:
        state = None if self._checkpoint is None else load_checkpoint(self._checkpoint, self._named())
        if state is None:
            return
        self._head.network.load_state_dict(state["network"])
        self._average.load_state_dict(state["average"])
        self._optimiser.load_state_dict(state["optimiser"])
        self._scaler.load_state_dict(state["scaler"])
        self._step, self._best, self._best_loss = state["step"], state["best"], state["best_loss"]
        self._without_better, self.history = state["without_better"], [tuple(point) for point in state["history"]]


class _Losses(nn.Module):
    """Head and loss as one module, so that several processes can train it: a reading and its truth to (N,)."""

    def __init__(self, head: ReadoutHead, lesson: Lesson) -> None:
        super().__init__()
        self.network = head.network
        self._head, self._lesson = head, lesson

    def forward(self, reading: Reading, truth: Tensor | None, cells: tuple[int, int]) -> Tensor:
        readouts = _read_head(self._head, reading, self._lesson.pictures, cells)
        with torch.autocast(readouts.device.type, enabled=False):
            return self._lesson.loss(readouts.float(), _on(truth, readouts))


def _read_head(head: ReadoutHead, reading: Reading, pictures: int, cells: tuple[int, int]) -> Tensor:
    """Readouts (N, K, D, h, w)."""
    return head.read(reading.features, reading.emb, cells, reading.noise_level).unflatten(0, (-1, pictures))


def _on(truth: Tensor | None, like: Tensor) -> Any:
    return None if truth is None else truth.to(like.device)


def _autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if precision == "bf16" else torch.float16)
