"""How the first latent moves, given the gradient of the finished picture's loss.

Both ways go through momentum, perturbation and what keeps the latent noise-like; they differ in the step:

* reference: the authors' (DOODL, ``gen`` in their code): -1/2 the gradient, the mean over the pair, each element clipped.
  How far it goes depends on the loss's scale.
* fast: the gradient over its RMS, times a length, so that every loss moves the latent as far; with momentum less of it, by
  as much as momentum makes of steps that have nothing to do with one another.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import torch
from torch import Tensor

from ..errors import OptimizationError
from .noise_like import Keep, Keeper

Mode = Literal["fast", "reference"]
#: RMS of a fast update without momentum, at strength 1; white noise has 1. What won on the demo world:
#: docs/optimize_noise.md.
LENGTH = 0.4
#: What the authors' code makes of the gradient.
HALF = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpdateSettings:
    """strength multiplies the step of either mode. reference: loss_scale (the authors' grad_scale), clip (largest element of
    a step, 0: none). noise: RMS of what is added to every update. tied: both of a pair stay the same. nesterov: as ReNO
    (arXiv 2406.04312). Raises OptimizationError for settings out of range."""

    mode: Mode = "fast"
    strength: float = 1.0
    clip: float = 1e-3
    loss_scale: float = 1.0
    momentum: float = 0.9
    nesterov: bool = False
    noise: float = 0.0
    tied: bool = True
    keep: Keep = "norm"

    def __post_init__(self) -> None:
        for name in ("strength", "clip", "noise", "loss_scale"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise OptimizationError(f"{name} is {value}: give 0 or more")
        if not 0 <= self.momentum < 1:
            raise OptimizationError(f"momentum is {self.momentum}: give 0 or more, and less than 1")


class Updater:
    """The latent z (P, B, C, H, W) of B pictures, from update to update: P = 2 coupled latents, a single one, or, not tied,
    all the noises that make a picture."""

    def __init__(self, z: Tensor, settings: UpdateSettings, like: Tensor | None = None) -> None:
        """like: what z is kept like, each of it like itself unless told; of a pair the first of both."""
        self.settings = settings
        self._keep = Keeper(z if like is None else like[:1], settings.keep)
        self._velocity: Tensor | None = None

    def __call__(self, z: Tensor, gradient: Tensor, noise: Tensor | None = None) -> Tensor:
        """z after an update. noise: what to perturb by, of RMS 1, (P, B, C, H, W) or (B, C, H, W), the same for both of
        a pair.

        A picture whose gradient is not finite does not move, and its momentum stays.
        """
        settings = self.settings
        step = self._reference(gradient) if settings.mode == "reference" else self._fast(gradient)
        usable = torch.isfinite(step).flatten(2).all(-1).all(0)[None, :, None, None, None]  # of both of a pair
        step = torch.where(usable, step, 0.0)
        before = self._velocity
        velocity = step if before is None else torch.where(usable, settings.momentum * before + step, before)
        self._velocity = velocity
        moved = z + (step + settings.momentum * velocity if settings.nesterov else velocity)
        if noise is not None and settings.noise:
            moved = moved + settings.noise * noise
        if settings.tied:
            moved = moved.mean(0, keepdim=True).expand_as(z)
        return torch.where(usable, self._keep(moved), z)

    def _reference(self, gradient: Tensor) -> Tensor:
        step = -HALF * self.settings.strength * self.settings.loss_scale * gradient
        if self.settings.tied:
            step = step.mean(0, keepdim=True).expand_as(step)
        return step.clamp(-self.settings.clip, self.settings.clip) if self.settings.clip else step

    def _fast(self, gradient: Tensor) -> Tensor:
        if self.settings.tied:
            gradient = gradient.mean(0, keepdim=True).expand_as(gradient)
        largest = gradient.flatten(2).abs().amax(-1)[..., None, None, None]
        shape = torch.where(largest > 0, gradient / largest, gradient)  # tiny gradients have no squares in fp32
        rms = shape.square().flatten(2).mean(-1).sqrt()[..., None, None, None]
        length = LENGTH * self.settings.strength * math.sqrt(1 - self.settings.momentum**2)
        return -length * torch.where(rms > 0, shape / rms, shape)
