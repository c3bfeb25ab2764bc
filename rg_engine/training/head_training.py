"""The training of a head: features come without a graph, only the head learns."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..heads import ReadoutHead
from ..heads.head import Network
from .data.draws import KeptFeatures, Read, Reading, draw_step, draw_validation
from .data.examples import Examples
from .distributed import Ranks
from .lessons import Lesson
from .loop import LoopSettings, Progress, Shown, Training
from .settings import TrainingSettings


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
        learned, kept_back = examples.split(settings.validation_share if settings.validate_every else 0.0)
        task = _Task(
            head=head, lesson=lesson, learned=learned, kept_back=kept_back, settings=settings, device=torch.device(device),
            read=KeptFeatures(read) if settings.noise_draws else read,
            rows=(ranks or Ranks()).share(settings.batch // settings.accumulate),
        )  # fmt: skip
        self._task = task
        self._training = Training(
            head.network, task.draw, task.losses, task.loop, name=head.name, facts=task.facts,
            validate=None if kept_back is None else task.validate, device=device, checkpoint=checkpoint, ranks=ranks,
        )  # fmt: skip

    @property
    def history(self) -> list[tuple[int, float, float | None]]:
        """Step, loss, validation."""
        return self._training.history

    def run(self, report: Callable[[Progress], None] | None = None) -> ReadoutHead:
        """As :meth:`Training.run`. Progress shows a few readouts and their truth at the steps that validate."""
        self._training.run(report)
        return self.best()

    def best(self) -> ReadoutHead:
        """The average of the weights: at the best validation, or as it is now; frozen and on the CPU."""
        task, spec = self._task, self._task.head.spec
        settings = {key: value for key, value in dataclasses.asdict(task.settings).items() if key != "timestep_convention"}
        training = {**spec.training, **settings, "steps": self._training.step, "examples": len(task.learned)}
        spec = dataclasses.replace(spec, training=training, timestep_convention=task.settings.timestep_convention)
        return ReadoutHead(network=cast(Network, self._training.best()), spec=spec, name=task.head.name)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Task:
    """What the loop asks about a head. rows: of a microbatch, this process's."""

    head: ReadoutHead
    lesson: Lesson
    learned: Examples
    kept_back: Examples | None
    settings: TrainingSettings
    device: torch.device
    read: Read
    rows: range

    @property
    def loop(self) -> LoopSettings:
        shared = ("steps", "learning_rate", "accumulate", "ema", "precision", "validate_every", "patience")
        return LoopSettings(**{name: getattr(self.settings, name) for name in shared})

    @property
    def facts(self) -> dict[str, Any]:
        """What a checkpoint must agree in."""
        facts = {
            "kind": self.head.spec.kind,
            "examples": len(self.learned),
            "maps": list(self.head.spec.feature_channels),
            "weights": sum(parameter.numel() for parameter in self.head.network.parameters()),
        }
        return {**facts, **dataclasses.asdict(self.settings)}

    def draw(self, step: int) -> Iterator[tuple[Reading, Tensor | None]]:
        whole, micro = draw_step(self.learned, self.settings, step), self.settings.batch // self.settings.accumulate
        for k in range(self.settings.accumulate):
            mine = whole.rows([k * micro + row for row in self.rows])
            yield self.read(mine).on(self.device), mine.truth

    def losses(self, reading: Reading, truth: Tensor | None) -> Tensor:
        """(N,), taken in fp32."""
        readouts = self.readouts(self.head, reading)
        with torch.autocast(readouts.device.type, enabled=False):
            return self.lesson.loss(readouts.float(), _on(truth, readouts))

    def validate(self, network: nn.Module) -> tuple[float, Shown]:
        """The loss on the examples kept back, and the first readouts beside their truth."""
        assert self.kept_back is not None
        average = dataclasses.replace(self.head, network=cast(Network, network))
        draw, micro = draw_validation(self.kept_back, self.settings), self.settings.batch // self.settings.accumulate
        losses, shown = [], None
        for first in range(0, len(draw.latents), micro):
            part = draw.rows(range(first, min(first + micro, len(draw.latents))))
            readouts = self.readouts(average, self.read(part).on(self.device))
            losses.append(self.lesson.loss(readouts, _on(part.truth, readouts)))
            shown = shown or (readouts[:4, 0].cpu(), None if part.truth is None else part.truth[:4])
        assert shown is not None
        return torch.cat(losses).mean().item(), shown

    def readouts(self, head: ReadoutHead, reading: Reading) -> Tensor:
        """(N, pictures, D, h, w)."""
        readouts = head.read(reading.features, reading.emb, self.learned.cells, reading.noise_level)
        return readouts.unflatten(0, (-1, self.lesson.pictures))


def _on(truth: Tensor | None, like: Tensor) -> Any:
    return None if truth is None else truth.to(like.device)
