"""Reads a latent out: the picture's pose, depth, edges or features, without sampling."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.sample
import torch
from torch import Tensor

from ...guidance.pictures import readout_picture, without_frames
from ...heads import ReadoutHead
from .frozen_model import FrozenModel, with_frozen_model
from .model import heads_on, tapped_for


def read_out(
    model: Any, head: ReadoutHead, latent: dict[str, Any], noise_percent: float, positive: Any, seed: int
) -> tuple[Tensor, Tensor]:
    """The readout (B, D, h, w) of a latent noised to ``noise_percent`` of the diffusion time (0 is clean), and its picture.

    Without ``positive`` the prompt is empty: zeros of the width that the model expects. Raises TargetError for a video.
    """
    backbone = tapped_for(model, [head])
    samples = without_frames(comfy.sample.fix_empty_latent_channels(model, latent["samples"]))
    noise = comfy.sample.prepare_noise(samples, seed, latent.get("batch_index"))
    cells = (samples.shape[-2], samples.shape[-1])

    def read(frozen: FrozenModel) -> Tensor:
        reading = frozen.read(samples, noise, torch.full((len(samples),), noise_percent))
        with heads_on([head], frozen.device), torch.no_grad():
            return head.read(reading.features, reading.emb, cells, reading.noise_level)

    readout = with_frozen_model(model, positive, tuple(samples.shape), read, backbone)
    readout = readout.to(comfy.model_management.intermediate_device())
    return readout, readout_picture(readout, head.spec, (8 * cells[0], 8 * cells[1]))
