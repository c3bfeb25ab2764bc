"""Trains a readout head on a loaded ComfyUI model."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ...errors import ReadoutGuidanceError, TrainingError
from ...features import Backbone
from ...heads import ReadoutHead
from ...training import Draw, Examples, HeadTraining, Progress, Reading, TrainingSettings, lesson_of, new_head
from ...training.distributed import Ranks
from ..loaded.frozen_model import FrozenModel, with_frozen_model
from ..loaded.model import backbone_of

log = logging.getLogger("readout_guidance")


def train_head(
    model: Any, examples: Examples, settings: TrainingSettings, *, name: str, positive: Any = None, projection: int = 384,
    background: float | None = None, temperature: float = 0.07, margin: float = 0.5, facts: dict[str, Any] | None = None,
    checkpoint: Path | None = None, ranks: Ranks | None = None, report: Callable[[Progress], None] | None = None,
    block: str = "", keep: Callable[[ReadoutHead], None] | None = None,
) -> tuple[ReadoutHead, list[tuple[int, float, float | None]]]:  # fmt: skip
    """Train a head for ``model`` (a ModelPatcher); returns it and the history: step, loss, validation.

    Args: positive, the prompt of the pictures (None: empty; one row a picture: each its own); projection, background,
    temperature, margin as :func:`new_head` and :func:`lesson_of` have them; block, which module's output is read, or its
    number in the order in which they run, several with commas in between (empty: the backbone's own taps); facts, for the
    head's metadata; keep is given the best head so far if the training breaks off, before the exception goes on. Raises
    TrainingError, BackboneError.
    """
    examples.check_enough()
    wanted = model.model.latent_format.latent_channels
    if examples.latents.shape[1] != wanted:
        raise TrainingError(
            f"the latents have {examples.latents.shape[1]} channels and the model works on {wanted}: encode the "
            "pictures with the VAE that belongs to the model"
        )
    rows = {len(context) for context, _ in positive or []}
    if rows - {1, len(examples.latents)}:
        raise TrainingError(
            f"the prompt has {max(rows)} rows for {len(examples.latents)} pictures: give one for all of them, or one each"
        )
    backbone = _read_at(backbone_of(model), block)
    if backbone.is_transformer and settings.timestep_convention == "reversed":
        raise TrainingError(
            "timestep_convention reversed is the authors', of UNets; heads on transformers take the noise level: use t"
        )
    maps = lesson_of(examples.kind).truth == "maps"
    channels = examples.truth.shape[1] if maps and examples.truth is not None else 0
    head = new_head(
        examples.kind, backbone, name=name, output_channels=channels, projection=projection, seed=settings.seed,
        training=facts,
    )  # fmt: skip
    lesson = lesson_of(examples.kind, background=background, temperature=temperature, margin=margin)
    backwards = settings.timestep_convention == "reversed"

    @torch.inference_mode(False)
    @torch.enable_grad()
    def work(frozen: FrozenModel) -> tuple[ReadoutHead, list[tuple[int, float, float | None]]]:
        def read(draw: Draw) -> Reading:
            count = draw.latents.shape[1]
            return frozen.read(
                draw.latents.flatten(0, 1), draw.noise.flatten(0, 1), draw.time.repeat_interleave(count),
                pictures=draw.pictures.flatten(), reversed_timestep=backwards,
            )  # fmt: skip

        training = HeadTraining(
            head, lesson, examples, read, settings, device=frozen.device, checkpoint=checkpoint, ranks=ranks
        )
        try:
            return training.run(report), training.history
        except BaseException:
            if keep is not None and training.history:
                try:
                    keep(training.best())
                except ReadoutGuidanceError as error:  # must not hide why the training broke off
                    log.warning("Readout guidance: the best head so far could not be kept: %s", error)
            raise

    pictures = settings.batch // settings.accumulate * lesson.pictures
    return with_frozen_model(model, positive, (pictures, *examples.latents.shape[1:]), work, backbone)


def _read_at(backbone: Backbone, blocks: str) -> Backbone:
    """The backbone read at some of its blocks, named or numbered, with commas in between; at its own taps if none is named.
    Raises BackboneError for one it has not."""
    known = [tap.path for tap in backbone.available]
    named = [block.strip() for block in blocks.split(",") if block.strip()]
    wanted = [known[int(block)] if block.isdecimal() and int(block) < len(known) else block for block in named]
    return backbone.at(wanted) if wanted else backbone
