"""From the first latent to the finished one, differentiable: by ComfyUI's own samplers, or by EDICT's coupled steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...errors import OptimizationError
from ...optimization import edict
from ..loaded.model import input_scale
from ..loaded.random_state import random_state_kept, random_states, set_random_states
from .network import Network
from .samplers import differentiable


class Trajectory:
    """One sampling run as a function of u, the noise's share of the first latent, at the network's input scale.

    From an empty latent u is the papers' latent z; at a schedule's highest level it is KSampler's noise; of an inverted
    latent it is all of it. start: u (B, C, H, W) that KSampler's seed gives.
    """

    def __init__(
        self, network: Network, sampler_name: str, sigmas: Tensor, extra_args: dict[str, Any], noise: Tensor, *,
        latent_image: Tensor, denoise_mask: Tensor | None = None, coupled: bool = False, inverted: bool = False,
        tick: Callable[[int], None] = lambda step: None,
    ) -> None:  # fmt: skip
        """inverted: latent_image is what sampling begins from as it is (Invert Latent's), and no noise is added."""
        self._network, self._sigmas, self._extra = network, sigmas, extra_args
        self._mask, self._coupled, self._tick = denoise_mask, coupled, tick
        self._sampler = differentiable(sampler_name)
        self._sampling = network.inner_model.model_sampling
        self._states = random_states(noise.device)
        self._scale = float(input_scale(network.inner_model, sigmas[:1], noise[:1]).flatten()[0])
        self._latent = latent_image
        ones = torch.ones_like(noise[:1, :1, :1, :1])
        self._share = float(self._noised(ones, torch.zeros_like(ones)).flatten()[0])  # of the noise in x
        if not self._share > 0:
            raise OptimizationError("sampling begins without noise, so that there is nothing to optimize: denoise more")
        if inverted:  # x is the latent itself, whatever the model makes of a latent to be noised
            noise = (latent_image - self._noised(torch.zeros_like(noise), latent_image)) / self._share
        self._noise = noise
        self.start = (latent_image if inverted else noise * self._share) * self._scale

    def first(self, u: Tensor) -> Tensor:
        """x at the first noise level."""
        return self._noised(self._noise_of(u), self._latent)

    def __call__(self, u: Tensor) -> Tensor:
        """Finished latents (P, B, C, H, W) in the model's scale, of u (P, B, C, H, W). The same noise is drawn on the way
        each time."""
        with random_state_kept(u.device):
            set_random_states(self._states)
            return self._pair(u) if self._coupled else self._single(u[0])[None]

    def _noise_of(self, u: Tensor) -> Tensor:
        """KSampler's noise, to the last bit where u is where it began."""
        return self._noise + (u - self.start) / (self._scale * self._share)

    def _noised(self, noise: Tensor, latent: Tensor) -> Tensor:
        return self._sampling.noise_scaling(
            self._sigmas[0], noise, latent, self._sampler.max_denoise(self._network, self._sigmas)
        )

    def _single(self, u: Tensor) -> Tensor:
        def tick(step: int, *_: Any) -> None:
            self._tick(step)

        return self._sampler.sample(
            self._network, self._sigmas, dict(self._extra), tick, self._noise_of(u), self._latent, self._mask, True
        )

    def _pair(self, u: Tensor) -> Tensor:
        levels = self._levels(u[0])

        def predict(z: Tensor, i: int) -> Tensor:
            self._tick(i)
            x = z / levels.scale[i]
            sigma = self._sigmas[i] * x.new_ones(len(x))
            return (x - self._network(x, sigma, **self._extra)) / self._sigmas[i]

        x, y = (self.first(row) * self._scale for row in u)
        pair = edict.sample_pair(x, y, predict, levels)
        ends = [self._sampling.inverse_noise_scaling(self._sigmas[-1], z / levels.scale[-1]) for z in pair]
        return torch.stack(ends)

    def _levels(self, like: Tensor) -> edict.Levels:
        scales = [
            float(input_scale(self._network.inner_model, sigma[None], like[:1]).flatten()[0]) for sigma in self._sigmas
        ]
        return edict.Levels(sigma=tuple(map(float, self._sigmas)), scale=tuple(scales))
