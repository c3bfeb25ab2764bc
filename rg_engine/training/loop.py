"""The loop of every training: of a head, of the demo model's parts, of an adapter's parameters on a frozen backbone.

AdamW with a warm-up, then falling to 0 as a cosine, or constant; a moving average of the weights, which is what a training
gives.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..errors import TrainingError
from .checkpoint import load_checkpoint, save_checkpoint
from .distributed import Ranks
from .settings import Precision

CHECKPOINT_EVERY_S = 60.0
#: The inputs of a step's microbatches: of each, this process's share.
Draw = Callable[[int], Iterable[tuple[Any, ...]]]
Schedule = Literal["cosine", "constant"]
#: Readouts (n, D, h, w) and their truth.
Shown = tuple[Tensor, Tensor | None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """learning_rate: reached after ``warm_up`` steps. accumulate: microbatches a step. ema: the average's decay; young_ema:
    less of it in the first steps, which are forgotten sooner then: (1 + n) / (10 + n) after n of them, as TensorFlow's
    ExponentialMovingAverage. clip: the gradient's largest norm. betas, weight_decay: AdamW's. precision: of the arithmetic
    (weights stay fp32). validate_every: steps between validations, 0 for never. patience: validations without a better one
    before training ends, 0 for no end. schedule: of the learning rate after the warm-up.
    Raises TrainingError for what no training can be.
    """

    steps: int
    learning_rate: float
    warm_up: int = 50
    accumulate: int = 1
    ema: float = 0.99
    young_ema: bool = False
    clip: float = math.inf
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    precision: Precision = "fp32"
    validate_every: int = 0
    patience: int = 0
    schedule: Schedule = "cosine"

    def __post_init__(self) -> None:
        if self.schedule not in get_args(Schedule):
            raise TrainingError(f"schedule {self.schedule!r} is unknown: expected one of {', '.join(get_args(Schedule))}")
        for name in ("steps", "learning_rate", "warm_up", "accumulate", "clip"):
            if not getattr(self, name) > 0:
                raise TrainingError(f"{name} is {getattr(self, name)}: it must be more than 0")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Progress:
    """A step's news. validation: the loss of the average on what was kept back, at steps that validate; shown: then what
    there is to see."""

    step: int
    steps: int
    loss: float
    validation: float | None = None
    shown: Shown | None = None


class Training:
    """A network in training; :meth:`run` trains it, :meth:`best` gives what it has become so far.

    Args:
        network: all that learns, in fp32. A frozen backbone stays out of it: ``compute_loss`` knows it.
        draw: a step's microbatches, without autocast. The same for the same step: a training that goes on repeats none.
        compute_loss: an input of ``draw`` to losses of any shape, in the settings' precision; their mean is learned from.
        name: in errors. facts: plain values that a checkpoint must agree in.
        validate: the average to its loss on what was kept back, and what there is to see. device: where the network learns.
        checkpoint: goes on from it if it is there, with the same result as without the break, and writes it.
        constrain: done to the network after each optimiser step, as COFT's projection is.
    """

    def __init__(
        self, network: nn.Module, draw: Draw, compute_loss: Callable[..., Tensor], settings: LoopSettings, *, name: str,
        facts: dict[str, Any], validate: Callable[[nn.Module], tuple[float, Shown | None]] | None = None,
        device: torch.device | str = "cpu", checkpoint: Path | None = None, ranks: Ranks | None = None,
        constrain: Callable[[nn.Module], None] | None = None,
    ) -> None:  # fmt: skip
        self._constrain = constrain
        self._draw, self._settings, self._name, self._facts = draw, settings, name, facts
        self._check = validate if settings.validate_every else None
        self._checkpoint, self._ranks, self._device = checkpoint, ranks or Ranks(), torch.device(device)
        self._network = network.to(self._device).train().requires_grad_(True)
        self._losses = _Losses(self._network, compute_loss)
        self._average = AveragedModel(self._network, multi_avg_fn=_average_of(settings))
        self._optimiser = torch.optim.AdamW(
            network.parameters(), lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay
        )
        self._scaler = torch.amp.GradScaler(self._device.type, enabled=settings.precision == "fp16")
        self._best: dict[str, Tensor] | None = None
        self._best_loss, self._without_better = math.inf, 0
        self.step = 0
        self.history: list[tuple[int, float, float | None]] = []  # step, loss, validation

    def run(self, report: Callable[[Progress], None] | None = None) -> None:
        """Train to the end, or until ``patience`` is spent. Raises TrainingError if a loss is not finite or the disk full.

        What ``report`` raises ends it too; :meth:`best` stays as it was at the last step, the checkpoint as it was written.
        """
        settings = self._settings
        self._resume()
        model = self._ranks.wrapped(self._losses)
        saved = time.monotonic()
        while not self._finished:
            loss = self._learn(model)
            self.step += 1
            validation, shown = None, None
            if self._check is not None and (self.step % settings.validate_every == 0 or self.step == settings.steps):
                validation, shown = self._validate(self._check)
            self.history.append((self.step, loss, validation))
            if self._finished or time.monotonic() - saved > CHECKPOINT_EVERY_S:
                self._save()
                saved = time.monotonic()
            if report is not None:
                report(Progress(step=self.step, steps=settings.steps, loss=loss, validation=validation, shown=shown))

    @property
    def _finished(self) -> bool:
        return self.step >= self._settings.steps or 0 < self._settings.patience <= self._without_better

    def best(self) -> nn.Module:
        """The average: at the best validation, or as it is now; a copy on the CPU."""
        network = copy.deepcopy(self._average.module).cpu()
        if self._best is not None:
            network.load_state_dict(self._best)
        return network

    def _learn(self, model: nn.Module) -> float:
        """One optimiser step; returns the loss of the whole batch."""
        settings, optimiser, count = self._settings, self._optimiser, self._settings.accumulate
        falling = 0.5 * (1 + math.cos(math.pi * self.step / settings.steps)) if settings.schedule == "cosine" else 1.0
        rate = min(1.0, (self.step + 1) / settings.warm_up) * falling
        for group in optimiser.param_groups:
            group["lr"] = settings.learning_rate * rate
        optimiser.zero_grad(set_to_none=True)
        losses = []
        for k, inputs in zip(range(1, count + 1), self._draw(self.step), strict=True):
            with contextlib.nullcontext() if k == count or self._ranks.world == 1 else model.no_sync():  # type: ignore[operator]
                with _autocast(settings.precision, self._device):
                    loss = model(*inputs).mean()
                self._scaler.scale(loss / count).backward()
            losses.append(loss.detach())
        loss = self._ranks.mean(torch.stack(losses).mean())
        if not torch.isfinite(loss):
            raise TrainingError(
                f"the loss of {self._name!r} is {loss.item()} at step {self.step}: lower the learning rate, or "
                f"look at the data{'. The last checkpoint is as it was' if self._checkpoint is not None else ''}"
            )
        slopes = [p.grad.abs().max() for p in self._network.parameters() if p.grad is not None]
        if not self._scaler.is_enabled() and not torch.isfinite(torch.stack(slopes)).all():  # the scaler skips such steps
            raise TrainingError(
                f"the gradient of {self._name!r} is not finite at step {self.step}: lower the learning rate, or "
                "look at the data"
            )
        if settings.clip < math.inf:
            self._scaler.unscale_(optimiser)
            nn.utils.clip_grad_norm_(self._network.parameters(), settings.clip)
        self._scaler.step(optimiser)
        self._scaler.update()
        if self._constrain is not None:
            with torch.no_grad():
                self._constrain(self._network)
        self._average.update_parameters(self._network)
        return loss.item()

    def _validate(self, check: Callable[[nn.Module], tuple[float, Shown | None]]) -> tuple[float, Shown | None]:
        """The average's loss on what was kept back; keeps the average if it is the best so far."""
        average = self._average.module
        with torch.no_grad():
            loss, shown = check(average)
        average.train()
        self._without_better += 1
        if loss < self._best_loss:
            self._best_loss, self._without_better = loss, 0
            self._best = {key: value.detach().cpu().clone() for key, value in average.state_dict().items()}
        return loss, shown

    @property
    def _parts(self) -> dict[str, Any]:
        """What has a state of its own, by its name in a checkpoint."""
        return {
            "network": self._network, "average": self._average, "optimiser": self._optimiser, "scaler": self._scaler
        }  # fmt: skip

    def _save(self) -> None:
        if self._checkpoint is None or not self._ranks.first:
            return
        plain = {
            "step": self.step, "best": self._best, "best_loss": self._best_loss, "without_better": self._without_better,
            "history": self.history, "settings": self._facts,
        }  # fmt: skip
        save_checkpoint(self._checkpoint, {**{key: part.state_dict() for key, part in self._parts.items()}, **plain})

    def _resume(self) -> None:
        state = None if self._checkpoint is None else load_checkpoint(self._checkpoint, self._facts)
        if state is None:
            return
        for key, part in self._parts.items():
            part.load_state_dict(state[key])
        self.step, self._best, self._best_loss = state["step"], state["best"], state["best_loss"]
        self._without_better, self.history = state["without_better"], [tuple(point) for point in state["history"]]


class _Losses(nn.Module):
    """The network and what is asked of it as one module, so that several processes can train it."""

    def __init__(self, network: nn.Module, compute_loss: Callable[..., Tensor]) -> None:
        super().__init__()
        self.network = network
        self._compute_loss = compute_loss

    def forward(self, *inputs: Any) -> Tensor:
        return self._compute_loss(*inputs)


def _average_of(settings: LoopSettings) -> Callable[..., None]:
    def average(averages: Any, values: Any, count: Tensor | int) -> None:
        young = (1 + int(count)) / (10 + int(count)) if settings.young_ema else 1.0
        get_ema_multi_avg_fn(min(settings.ema, young))(averages, values, count)

    return average


def _autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if precision == "bf16" else torch.float16)
