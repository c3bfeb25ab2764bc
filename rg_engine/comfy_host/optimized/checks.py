"""What Optimize Noise refuses before it samples."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor

from ...errors import OptimizationError
from ...guidance import Target
from ...optimization import PictureLoss
from ..edits.inversion import Inverted
from ..guided.model import guidance_of

log = logging.getLogger("readout_guidance")


def check_inputs(model: Any, vae: Any, loss: PictureLoss | None, targets: tuple[Target, ...], samples: Tensor) -> None:
    """Raises OptimizationError for a run that has no aim, or whose parts do not belong together."""
    if loss is None and not targets:
        raise OptimizationError("there is nothing to optimize for: connect a loss (CLIP Loss, Picture Loss) or a target")
    if loss is not None:
        loss.check_batch(len(samples))
    if any(target.drag_frames > 1 for target in targets):
        raise OptimizationError(
            "drags in several frames are pictures of their own: set frames of Drag Points to 1, or play them with "
            "Readout-Guided KSampler"
        )
    if guidance_of(model):
        raise OptimizationError(
            "the model is guided by Apply Readout Guidance, which moves the latent by itself while it is sampled: connect "
            "the model without it and its target to target, or send the noise that comes out to a guided sampler"
        )
    if samples.ndim not in (4, 5) or samples.shape[2:-2] not in ((), (1,)):
        raise OptimizationError(
            f"the latent is {tuple(samples.shape)}: only pictures are optimized, no video of several frames, sound or 3D"
        )
    channels = getattr(vae, "latent_channels", samples.shape[1])
    if channels != samples.shape[1]:
        raise OptimizationError(
            f"the vae takes latents of {channels} channels and the model makes {samples.shape[1]}: connect the model's vae"
        )


def check_latent(masked: bool, inverted: bool, denoise: float, coupled: bool, all_noises: bool) -> None:
    """Raises OptimizationError where only a part of what is asked for could be done."""
    if coupled and all_noises:
        raise OptimizationError("coupled latents (edict) are sampled without noise on the way: set noises to first")
    if coupled and masked:
        raise OptimizationError("coupled latents (edict) know no noise mask: remove it, or set couple to none")
    if inverted and (masked or denoise < 1.0):
        raise OptimizationError("an inverted latent is sampled as a whole: remove the noise mask, and set denoise to 1")


def check_inversion(inverted: Inverted, sigma: float, steps: int, scheduler: str, cfg: float) -> None:
    """Raises OptimizationError where sampling would begin at another noise level, sigma, than the latent is at."""
    if abs(sigma - inverted.sigma) > 0.01 * inverted.sigma:
        raise OptimizationError(
            f"the latent was inverted to noise level {inverted.sigma:.4g} and sampling would begin at {sigma:.4g}: use "
            f"steps {inverted.steps} and scheduler {inverted.scheduler}"
        )
    if (steps, scheduler, cfg) != (inverted.steps, inverted.scheduler, inverted.cfg):
        log.warning(
            "Optimize Noise: the latent belongs to %d steps, %s, cfg %g; with other settings it begins as another picture.",
            inverted.steps, inverted.scheduler, inverted.cfg,
        )  # fmt: skip
