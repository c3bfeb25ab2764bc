"""The training of an adapter: the loop of every training, with the frozen model's own loss on the subject and on its
class."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...training.distributed import Ranks
from ...training.loop import Progress, Training
from ..adapter import Adapter
from .examples import AdapterExamples, Noisy
from .settings import OftSettings
from .turns import Turns

#: The frozen model's squared error, (n,), in the units of what its network predicts, with the turns in force: of pictures,
#: or of pictures of the class.
Loss = Callable[[Turns, Noisy, bool], Tensor]


class AdapterTraining:
    """One adapter in training; :meth:`run` trains it, :meth:`best` gives what it has become so far.

    Args: turns, which learn; loss, the frozen model's; facts, of the model, which a checkpoint must agree in.
    """

    def __init__(
        self, turns: Turns, examples: AdapterExamples, loss: Loss, settings: OftSettings, *, facts: dict[str, Any],
        device: torch.device | str = "cpu", checkpoint: Path | None = None, ranks: Ranks | None = None,
    ) -> None:  # fmt: skip
        self._settings, self._examples, self._loss = settings, examples, loss
        self._learned, self._kept = examples.split(settings.validation_share)
        self._share = (ranks or Ranks()).share(settings.batch // settings.accumulate)
        self._turns = turns
        self._facts = facts
        count = 0 if examples.class_latents is None else len(examples.class_latents)
        agreed = {
            **dataclasses.asdict(settings), **facts, "pictures": len(examples.latents), "class_pictures": count,
            "numbers": sum(parameter.numel() for parameter in turns.parameters()),
        }  # fmt: skip
        self._training = Training(
            turns, self._draw, self._losses, settings.loop, name="the adapter", facts=agreed,
            validate=self._validate if self._kept else None, device=device, checkpoint=checkpoint, ranks=ranks,
            constrain=lambda network: cast(Turns, network).project(),
        )  # fmt: skip

    @property
    def history(self) -> list[tuple[int, float, float | None]]:
        """Step, loss, validation."""
        return self._training.history

    def run(self, report: Callable[[Progress], None] | None = None) -> Adapter:
        self._training.run(report)
        return self.best()

    def best(self) -> Adapter:
        """The average of the triangles, which stays skew and in COFT's ball: at the best validation, or as it is now."""
        turns, settings = self.best_turns(), self._settings
        kept = ("learning_rate", "batch", "layers", "coft_eps", "prior_weight", "seed")
        facts = {**self._facts, **{name: getattr(settings, name) for name in kept}, "steps": self._training.step}
        return Adapter(layout="trained here", layers=turns.layers(), facts=facts)

    def best_turns(self) -> Turns:
        return cast(Turns, self._training.best())

    def _draw(self, step: int) -> Iterator[tuple[Noisy, Noisy | None]]:
        settings, examples = self._settings, self._examples
        whole = examples.draw(step, settings.batch, self._learned, settings.seed)
        prior = settings.prior_weight > 0 and examples.class_latents is not None
        of_class = examples.draw_class(step, settings.batch, settings.seed) if prior else None
        micro = settings.batch // settings.accumulate
        for k in range(settings.accumulate):
            mine = [k * micro + row for row in self._share]
            yield whole.rows(mine), None if of_class is None else of_class.rows(mine)

    def _losses(self, noisy: Noisy, of_class: Noisy | None) -> Tensor:
        loss = self._loss(self._turns, noisy, False)
        return loss if of_class is None else loss + self._settings.prior_weight * self._loss(self._turns, of_class, True)

    def _validate(self, network: nn.Module) -> tuple[float, None]:
        draw = self._examples.draw_validation(self._kept, self._settings.seed)
        micro = self._settings.batch // self._settings.accumulate
        parts = [draw.rows(range(i, min(i + micro, len(draw.time)))) for i in range(0, len(draw.time), micro)]
        return torch.cat([self._loss(cast(Turns, network), part, False) for part in parts]).mean().item(), None
