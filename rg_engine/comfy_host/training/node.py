"""What the Train Readout Head node does around a training: its data, progress, preview, and what an interrupt leaves."""

from __future__ import annotations

import logging
from typing import Any

import comfy.utils
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...errors import TrainingError
from ...guidance.pictures import readout_picture, without_frames
from ...guidance.targets import fit
from ...heads import HeadSpec, ReadoutHead
from ...training import Examples, Progress, TrainingSettings, in_a_row, lesson_of
from ...training.new_head import as_controls, empty_value, range_of
from ...training.plot import loss_plot
from ...types import HeadKind
from ..folders import checkpoint_path, save_named_head
from .head import train_head

log = logging.getLogger("readout_guidance")
PREVIEW_PX = 192


def train_in_graph(
    model: Any, positive: Any, latents: dict[str, Any] | None, images: Tensor | None, vae: Any, targets: Any, *, kind:
    HeadKind, sparse: bool, projection: int, settings: TrainingSettings, checkpoint: str, block: str = "",
) -> tuple[ReadoutHead, Tensor, Tensor]:  # fmt: skip
    """The head, the loss plot, and readouts against targets as a picture. An interrupt leaves the best head so far in
    models/readout_heads, and goes on.
    """
    path = checkpoint_path(checkpoint) if checkpoint.strip() else None
    examples = graph_examples(kind, _latents(latents, images, vae), targets)
    bar = comfy.utils.ProgressBar(settings.steps)
    latest: list[Tensor] = [torch.zeros(1, PREVIEW_PX, 2 * PREVIEW_PX, 3)]

    def report(progress: Progress) -> None:
        preview = None
        if progress.shown is not None:
            latest[0] = compare(*progress.shown, spec)
            pixels = (latest[0][0].clamp(0, 1) * 255).round().to(torch.uint8).numpy()
            preview = ("JPEG", Image.fromarray(np.ascontiguousarray(pixels)), 1024)
            log.info("Training %s, step %d of %d: validation %.5g", kind, progress.step, progress.steps, progress.validation)
        bar.update_absolute(progress.step, progress.steps, preview)

    def keep(head: ReadoutHead) -> None:
        name = save_named_head(head, f"interrupted_{kind}", overwrite=True)
        log.warning("The training broke off after %d steps; its best head is %s.", head.spec.training["steps"], name)

    spec = HeadSpec(kind=kind, feature_channels=(), control_range=range_of(kind))
    head, history = train_head(
        model, examples, settings, name=f"{kind} head", positive=positive, projection=projection,
        background=empty_value(kind, sparse), checkpoint=path, report=report, keep=keep, block=block,
    )  # fmt: skip
    return head, loss_plot(history, kind), latest[0]


def graph_examples(kind: HeadKind, latents: Tensor, targets: Any) -> Examples:
    """Examples of what a graph holds: latents (M, C, h, w), and pictures, heat maps, a LATENT, tracks or masks as
    targets."""
    truth = lesson_of(kind).truth
    if isinstance(targets, dict):
        targets = without_frames(targets["samples"])
    if targets is None:
        return in_a_row(kind, latents, None)
    if truth == "regions" and isinstance(targets, Tensor) and targets.ndim == 4 and targets.shape[-1] <= 4:
        targets = targets.mean(-1)  # pictures of masks
    if truth == "regions" and isinstance(targets, Tensor) and targets.ndim == 3:
        if len(targets) != len(latents):
            raise TrainingError(
                f"there are {len(targets)} masks for {len(latents)} pictures: give one a picture, or none at all"
            )
        masks = fit(targets[:, None].float().clamp(0, 1), (latents.shape[-2], latents.shape[-1]))  # (M, 1, h, w)
        pictures = lesson_of(kind).pictures
        targets = masks[: len(masks) // pictures * pictures].reshape(-1, pictures, *masks.shape[-2:])
    if not isinstance(targets, Tensor) or targets.ndim != 4:
        raise TrainingError(
            f"targets are {type(targets).__name__}: connect a batch of pictures, heat maps, a latent, tracks or masks"
        )
    if truth == "maps" and kind == "lgp" and targets.shape[1] != latents.shape[1]:
        raise TrainingError(
            f"targets of an lgp head are encoded edge maps, and these have {targets.shape[1]} channels where the "
            f"latents have {latents.shape[1]}: put the edge maps through VAE Encode"
        )
    if truth == "maps":
        pictures = targets.shape[-1] <= 4 and targets.shape[1] > 4  # (N, H, W, C), as pictures come
        maps = fit((targets.movedim(-1, 1) if pictures else targets).float(), (latents.shape[-2], latents.shape[-1]))
        if kind == "spatial":
            if not pictures:
                raise TrainingError("a spatial head learns from pictures: connect a batch of control pictures as targets")
            maps = as_controls(maps)
        targets = maps
    return in_a_row(kind, latents, targets.clone())


def compare(readouts: Tensor, truth: Tensor | None, spec: HeadSpec) -> Tensor:
    """Readouts (n, D, h, w) in a row, and below them what they should be, (1, H, W, 3) in 0..1."""
    rows = [readouts] if truth is None or truth.shape[1:] != readouts.shape[1:] else [readouts, truth]
    pictures = readout_picture(torch.cat(rows), spec, (PREVIEW_PX, PREVIEW_PX)).unflatten(0, (len(rows), -1))
    return torch.cat([torch.cat(list(row), 1) for row in pictures], 0)[None]


def _latents(latents: dict[str, Any] | None, images: Tensor | None, vae: Any) -> Tensor:
    if latents is not None:
        samples = latents["samples"]
        return without_frames(samples).clone().float().cpu()
    if images is None or vae is None:
        raise TrainingError(
            "there is nothing to learn from: connect latents (pictures through VAE Encode), or images and vae"
        )
    return torch.cat([without_frames(vae.encode(part[..., :3])).clone().float().cpu() for part in images.split(16)])
