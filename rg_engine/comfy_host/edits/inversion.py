"""Finds the noise from which a deterministic sampler makes a given picture, along ComfyUI's own sigmas."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import torch
from torch import Tensor

from ...errors import TargetError
from ..loaded.frozen_model import empty_prompt

#: Fixed-point steps for each step of the schedule; 0 is plain DDIM inversion.
REFINEMENTS = 4
INVERTED = "readout_guidance_inverted"  # in a LATENT: what it was inverted with


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inverted:
    """What an inverted latent goes back with. rms: its own. error: RMS of the latent's reconstruction against itself, as a
    part of its own RMS."""

    sigma: float
    steps: int
    scheduler: str
    cfg: float
    rms: float
    error: float


def invert_latent(
    model: Any, latent: dict[str, Any], *, steps: int, scheduler: str, positive: Any = None, negative: Any = None, cfg:
    float = 1.0, refinements: int = REFINEMENTS,
) -> tuple[dict[str, Any], float]:  # fmt: skip
    """A LATENT to begin sampling from instead of noise, and the reconstruction's error.

    Raises TargetError if the latent is empty, or cfg is not 1 and there is no negative prompt.
    """
    samples = comfy.sample.fix_empty_latent_channels(model, latent["samples"])
    if not bool(torch.count_nonzero(samples)):
        raise TargetError("the latent to invert is empty: connect a picture through VAE Encode")
    if cfg != 1.0 and negative is None:
        raise TargetError(f"cfg is {cfg:g}, which needs a negative prompt to invert with: connect negative, or set cfg to 1")
    guider = comfy.samplers.CFGGuider(model.clone())
    guider.inner_set_conds({"positive": positive if positive is not None else empty_prompt(model)})
    if negative is not None:
        guider.inner_set_conds({"negative": negative})
    guider.set_cfg(cfg)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), scheduler, steps)
    inversion = _Inversion(refinements)
    noise = guider.sample(torch.zeros_like(samples), samples, inversion, sigmas, disable_pbar=True, seed=0)
    samples = noise.to(comfy.model_management.intermediate_device())
    facts = Inverted(
        sigma=float(sigmas[0]), steps=steps, scheduler=scheduler, cfg=cfg, rms=_rms(samples), error=inversion.error
    )
    return {**latent, "samples": samples, INVERTED: facts}, inversion.error


def inversion_of(latent: dict[str, Any]) -> Inverted | None:
    """What a LATENT was inverted with; None if it was not, or another node has made a picture of it since, which keeps the
    mark: noise is many times as large."""
    facts: Inverted | None = latent.get(INVERTED)
    return facts if facts is not None and 0.5 < _rms(latent["samples"]) / facts.rms < 2.0 else None


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


class _Inversion(comfy.samplers.Sampler):
    """A 'sampler' that goes up the schedule instead of down, and once down again to see what is lost.

    Euler's step down from x' at s' to x at s is x = x' + (s - s') d(x', s'), d = (x' - denoised) / s'. Going up, x' is
    sought: DDIM inversion takes d at x, which is not where the step down takes it; repeating x' = x + (s' - s) d(x', s')
    mends that.
    """

    def __init__(self, refinements: int) -> None:
        self._refinements = refinements
        self.error = float("nan")

    def sample(
        self, model_wrap: Any, sigmas: Tensor, extra_args: dict, callback: Any, noise: Tensor, latent_image: Tensor,
        *_: Any, **__: Any,
    ) -> Tensor:  # fmt: skip
        def derivative(x: Tensor, sigma: Tensor) -> Tensor:
            comfy.model_management.throw_exception_if_processing_interrupted()
            return (x - model_wrap(x, sigma * x.new_ones([x.shape[0]]), **extra_args)) / sigma

        rising, total = sigmas.flip(0), 2 * (len(sigmas) - 1)
        x = latent_image.clone()
        for i, (low, high) in enumerate(itertools.pairwise(rising)):
            step = high - low
            found = x + step * derivative(x, high)
            for _repeat in range(self._refinements):
                found = x + step * derivative(found, high)
            x = found
            if callback is not None:
                callback(i, x, x, total)
        back = x
        for i, (high, low) in enumerate(itertools.pairwise(sigmas)):
            back = back + (low - high) * derivative(back, high)
            if callback is not None:
                callback(len(sigmas) - 1 + i, back, back, total)
        self.error = _rms(back - latent_image) / _rms(latent_image)
        return x
