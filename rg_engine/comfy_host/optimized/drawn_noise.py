"""The noises that a stochastic sampler draws on its way, so that all of them can be optimized (DNO, arXiv 2405.18881)."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from comfy.k_diffusion.sampling import BrownianTreeNoiseSampler, default_noise_sampler
from torch import Tensor

from ...errors import OptimizationError

#: What k-diffusion's samplers call: the noise between two levels, of variance 1.
NoiseSampler = Callable[[Any, Any], Tensor]
PARAMETER = "noise_sampler"


def draws(sampler: Any) -> bool:
    """Whether a KSAMPLER takes the noises that it draws from outside."""
    return PARAMETER in inspect.signature(sampler.sampler_function).parameters


@contextlib.contextmanager
def drawing(sampler: Any, noise_sampler: NoiseSampler | None) -> Iterator[None]:
    """In which a KSAMPLER draws from ``noise_sampler``; from its own where that is None."""
    before = sampler.extra_options
    if noise_sampler is not None:
        sampler.extra_options = {**before, PARAMETER: noise_sampler}
    try:
        yield
    finally:
        sampler.extra_options = before


def drawn_noises(
    name: str, sampler: Any, sample: Callable[[Any], Tensor], network: Any, sigmas: Tensor, noise: Tensor, seed: int
) -> Tensor:
    """What a KSAMPLER draws on its way, (K, *noise.shape): found by sampling with a model that predicts its own input.

    sample: from ``noise`` with a model, with the random state as it will be. Which of k-diffusion's two noise samplers is
    the sampler's own is seen from that it ends in the same. Raises OptimizationError for a sampler that draws none.
    """
    way_out = "set noises to first, or use euler_ancestral or lcm"
    if not draws(sampler):
        raise OptimizationError(f"the sampler {name!r} draws no noise on its way that could be optimized: {way_out}")
    own = sample(_Echo(network))
    levels = sigmas[sigmas > 0]
    for make in (
        lambda: default_noise_sampler(noise, seed=seed),
        lambda: BrownianTreeNoiseSampler(noise, levels.min(), levels.max(), seed=seed, cpu=True),
    ):
        record = _Record(make())
        with drawing(sampler, record):
            end = sample(_Echo(network))
        if torch.equal(end, own):
            break
    else:
        raise OptimizationError(f"how the sampler {name!r} draws its noise is not known in this ComfyUI: {way_out}")
    if not record.drawn:
        raise OptimizationError(f"in {len(sigmas) - 1} steps the sampler {name!r} draws no noise on its way: {way_out}")
    return torch.stack(record.drawn)


class _Record:
    def __init__(self, draw: NoiseSampler) -> None:
        self._draw = draw
        self.drawn: list[Tensor] = []

    def __call__(self, sigma: Any, sigma_next: Any) -> Tensor:
        self.drawn.append(self._draw(sigma, sigma_next))
        return self.drawn[-1]


class _Echo:
    """A model as samplers see it, that predicts its own input."""

    def __init__(self, network: Any) -> None:
        self._network = network

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)

    def __call__(self, x: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        return x
