"""One-step guidance by a loss of pictures, DOODL's usual rival: at each step the picture that the model predicts is decoded
and measured, and its gradient moves the latent (as arXiv 2302.07121, without its other parts).

A lab's piece, to compare with: it takes the same loss, decoder and network calls as Optimize Noise.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import comfy.sample
import comfy.samplers
import torch
from torch import Tensor

from ...comfy_host.loaded.frozen_layers import plain
from ...comfy_host.loaded.model import input_scale
from ...comfy_host.optimized.measured.decoding import Decoder
from ...comfy_host.optimized.network import Network
from ...guidance import rms_step
from ...optimization import PictureLoss


@dataclasses.dataclass(frozen=True, kw_only=True)
class OneStep:
    """moves: at each sampler step; as many take the network's time of as many updates of Optimize Noise. path: what their
    RMS lengths in z come to, over all steps."""

    loss: PictureLoss
    moves: int
    path: float


class OneStepGuidance(comfy.samplers.Sampler):
    """Euler's steps, with moves before each."""

    def __init__(self, settings: OneStep, vae: Any) -> None:
        self._settings, self._decoder = settings, Decoder(vae)

    def sample(
        self, model_wrap: Any, sigmas: Tensor, extra_args: dict, callback: Any, noise: Tensor, latent_image: Tensor,
        denoise_mask: Tensor | None = None, disable_pbar: bool = False,
    ) -> Tensor:  # fmt: skip
        conds = model_wrap.conds
        with torch.inference_mode(False), torch.no_grad():
            model_wrap.conds = {name: plain(conds[name]) for name in conds}
            noise, latent_image, sigmas = plain([noise, latent_image, sigmas])
            network = Network(model_wrap, extra_args["model_options"], "full", 2)
            x = model_wrap.inner_model.model_sampling.noise_scaling(sigmas[0], noise, latent_image, True)
            try:
                for i in range(len(sigmas) - 1):
                    x = self._step(network, x, sigmas[i], sigmas[i + 1], len(sigmas) - 1, extra_args)
            finally:
                model_wrap.conds = conds
        return x

    def _step(self, network: Network, x: Tensor, sigma: Tensor, following: Tensor, steps: int, extra: dict) -> Tensor:
        level = sigma * x.new_ones(len(x))
        scale = input_scale(network.inner_model, level, x)
        length = self._settings.path / (steps * self._settings.moves)
        for _ in range(self._settings.moves):
            leaf = x.clone().requires_grad_()
            with torch.enable_grad():
                denoised = network(leaf, level, **extra)
                images = self._decoder(network.inner_model.process_latent_out(denoised))
                (gradient,) = torch.autograd.grad(self._settings.loss(images, torch.Generator()).sum(), leaf)
            x = x + rms_step(gradient, length) / scale
        denoised = network(x, level, **extra)
        return x + (x - denoised) / sigma * (following - sigma)


def one_step_guided(
    model: Any, vae: Any, settings: OneStep, *, seed: int, steps: int, cfg: float, scheduler: str, positive: Any,
    negative: Any, latent: dict[str, Any],
) -> Tensor:  # fmt: skip
    """Finished latents (B, C, h, w); with path 0 those of KSampler's euler."""
    samples = comfy.sample.fix_empty_latent_channels(model, latent["samples"])
    sigmas = comfy.samplers.KSampler(model, steps, model.load_device, "euler", scheduler, 1.0, model.model_options).sigmas
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    noise = comfy.sample.prepare_noise(samples, seed)
    return guider.sample(noise, samples, OneStepGuidance(settings, vae), sigmas, disable_pbar=True, seed=seed)
