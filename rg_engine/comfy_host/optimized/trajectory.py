"""From the first latent to the finished one, differentiable: by ComfyUI's own samplers, or by EDICT's coupled steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from ...errors import OptimizationError
from ...guidance.pictures import without_frames
from ...optimization import edict
from ..loaded.model import input_scale
from ..loaded.random_state import random_state_kept, random_states, set_random_states
from .drawn_noise import drawing, drawn_noises
from .network import Network
from .samplers import differentiable

#: first: what sampling begins from; all: beside it, each noise that a stochastic sampler draws on its way.
Noises = Literal["first", "all"]


class Trajectory:
    """One sampling run as a function of u (P, B, C, H, W): the noise's share of the first latent, at the network's input
    scale, P = 2 times for coupled latents; with all noises, after it each one that the sampler draws on its way.

    From an empty latent u is the papers' latent z; at a schedule's highest level it is KSampler's noise; of an inverted
    latent it is all of it. start: the u that KSampler's seed gives. Latents may be (B, C, 1, H, W), of a model that makes
    videos too.
    """

    def __init__(
        self, network: Network, sampler_name: str, sigmas: Tensor, extra_args: dict[str, Any], noise: Tensor, *,
        latent_image: Tensor, denoise_mask: Tensor | None = None, coupled: bool = False, inverted: bool = False,
        noises: Noises = "first", tick: Callable[[int], None] = lambda step: None,
    ) -> None:  # fmt: skip
        """inverted: latent_image is what sampling begins from as it is (Invert Latent's), and no noise is added."""
        self._network, self._sigmas, self._extra = network, sigmas, extra_args
        self._mask, self._coupled, self._tick = denoise_mask, coupled, tick
        self._sampling = network.inner_model.model_sampling
        self._sampler = differentiable(sampler_name, self._sampling)
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
        starts = [(latent_image if inverted else noise * self._share) * self._scale] * (2 if coupled else 1)
        if noises == "all":
            starts += self._drawn(sampler_name)
        self.start = torch.stack([without_frames(each) for each in starts])

    def first(self, u: Tensor) -> Tensor:
        """x at the first noise level, of u (B, C, H, W)."""
        return self._noised(self._noise_of(u), self._latent)

    def __call__(self, u: Tensor) -> Tensor:
        """Finished latents in the model's scale: one of each picture, two where they are coupled. What is not in u is drawn
        alike each time."""
        with random_state_kept(u.device):
            set_random_states(self._states)
            return self._pair(u) if self._coupled else self._single(u)[None]

    def _noise_of(self, u: Tensor) -> Tensor:
        """KSampler's noise, to the last bit where u is where it began."""
        return self._noise + ((u - self.start[0]) / (self._scale * self._share)).view_as(self._noise)

    def _noised(self, noise: Tensor, latent: Tensor) -> Tensor:
        return self._sampling.noise_scaling(
            self._sigmas[0], noise, latent, self._sampler.max_denoise(self._network, self._sigmas)
        )

    def _single(self, u: Tensor) -> Tensor:
        rest = iter(u[1:])
        given = (lambda *_: next(rest).view_as(self._noise)) if len(u) > 1 else None
        with drawing(self._sampler, given):
            return self._sample(self._network, self._noise_of(u[0]), lambda step, *_: self._tick(step))

    def _sample(self, model: Any, noise: Tensor, callback: Callable[..., None] | None = None) -> Tensor:
        return self._sampler.sample(model, self._sigmas, dict(self._extra), callback, noise, self._latent, self._mask, True)

    def _drawn(self, sampler_name: str) -> Tensor:
        def sample(model: Any) -> Tensor:
            set_random_states(self._states)
            return self._sample(model, self._noise)

        with random_state_kept(self._noise.device):
            return drawn_noises(
                sampler_name, self._sampler, sample, self._network, self._sigmas, self._noise, self._extra.get("seed", 0)
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
