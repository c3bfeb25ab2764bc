"""Trains an orthogonal adapter on a loaded ComfyUI model, which stays as it is."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ....adapters import Adapter
from ....adapters.learning import AdapterExamples, AdapterTraining, OftSettings
from ....errors import BackboneError, ReadoutGuidanceError, TrainingError
from ....training import Progress
from ....training.distributed import Ranks
from ...loaded.frozen_model import FrozenModel, with_frozen_model
from ...loaded.gradient_scope import Graph
from ...loaded.memory import GraphSize, with_room_for_graph
from ...loaded.model import backbone_of
from .turning import TurnedModel, new_turns

log = logging.getLogger("readout_guidance")
History = list[tuple[int, float, float | None]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preview:
    """Pictures sampled while it trains: every so many steps (0: never), so many of them, with this cfg."""

    every: int = 0
    count: int = 2
    steps: int = 12
    cfg: float = 4.0


def train_adapter(
    model: Any, examples: AdapterExamples, settings: OftSettings, *, positive: Any = None, class_positive: Any = None,
    negative: Any = None, graph: Graph = "full", checkpoint: Path | None = None, ranks: Ranks | None = None,
    preview: Preview | None = None, report: Callable[[Progress, Tensor | None], None] | None = None,
    keep: Callable[[Adapter], None] | None = None, facts: dict[str, Any] | None = None,
) -> tuple[Adapter, History, list[str]]:  # fmt: skip
    """Train an adapter for ``model`` (a ModelPatcher): it, the history (step, loss, validation), and what was not as asked.

    Args: positive, class_positive, negative: prompts of the pictures, of the class pictures, and of previews' other side
    (None: empty); report also gets latents of previews; keep is given the best adapter so far if the training breaks off,
    before the exception goes on. Raises TrainingError.
    """
    _check(model, examples, positive, class_positive, settings)
    preview = preview or Preview()

    @torch.inference_mode(False)
    @torch.enable_grad()
    def work(frozen: FrozenModel) -> tuple[Adapter, History, list[str]]:
        turns, notes = new_turns(frozen.network, settings)
        with TurnedModel(frozen, graph) as turned:
            training = AdapterTraining(
                turns, examples, turned.loss, settings, facts={"layers_turned": len(turns.blocks), **(facts or {})},
                device=frozen.device, checkpoint=checkpoint, ranks=ranks,
            )  # fmt: skip

            def told(progress: Progress) -> None:
                shown = None
                if preview.every and progress.step % preview.every == 0:
                    noise = np.random.default_rng((settings.seed, 3)).standard_normal(
                        (preview.count, *examples.latents.shape[1:]), dtype=np.float32
                    )
                    shown = turned.sample(turns, torch.from_numpy(noise), preview.steps, preview.cfg)
                if report is not None:
                    report(progress, shown)

            try:
                return training.run(told), training.history, notes
            except BaseException:
                if keep is not None and training.history:
                    try:
                        keep(training.best())
                    except ReadoutGuidanceError as error:  # must not hide why the training broke off
                        log.warning("Train OFT: the best adapter so far could not be kept: %s", error)
                raise

    prior = examples.class_latents is not None and settings.prior_weight > 0
    shape = _with_room(model, (settings.batch // settings.accumulate, *examples.latents.shape[1:]), graph, 2 if prior else 1)
    prompts = {"negative": negative, **({"class": class_positive} if examples.class_latents is not None else {})}
    return with_frozen_model(model, positive, shape, work, tapped=False, more=prompts)


def _with_room(model: Any, shape: tuple[int, ...], graph: Graph, passes: int) -> tuple[int, ...]:
    """A shape for which ComfyUI makes room for the graphs too, where the network is one whose graph was counted."""
    try:
        size = GraphSize(backbone=backbone_of(model), heads=(), branches=passes)
    except BackboneError:
        return shape
    return tuple(with_room_for_graph(model, size, shape, graph))


def _check(model: Any, examples: AdapterExamples, positive: Any, class_positive: Any, settings: OftSettings) -> None:
    wanted = model.model.latent_format.latent_channels
    if examples.latents.shape[1] != wanted:
        raise TrainingError(
            f"the latents have {examples.latents.shape[1]} channels and the model works on {wanted}: encode the pictures "
            "with the VAE that belongs to the model"
        )
    if (examples.class_latents is None) != (class_positive is None):
        missing = "class_latents" if examples.class_latents is None else "class_positive, their prompt,"
        raise TrainingError(
            f"prior preservation takes pictures of the class and a prompt for them: connect {missing} as well, or neither"
        )
    pairs = [("the prompt", positive, examples.latents), ("the class prompt", class_positive, examples.class_latents)]
    for what, prompt, latents in pairs:
        rows = {len(context) for context, _ in prompt or []}
        if latents is not None and rows - {1, len(latents)}:
            raise TrainingError(
                f"{what} has {max(rows)} rows for {len(latents)} pictures: give one for all of them, or one each"
            )
    examples.split(settings.validation_share)
