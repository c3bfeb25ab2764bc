"""Noise levels between a picture and its mixing step, and the scale of latents there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...boundaries.boundary import LAST_TIMESTEP


def timesteps_up_to(timestep: int, steps: int) -> list[int]:
    """``steps`` timesteps from 0 to ``timestep``, rising, in even steps rounded down, as the paper's code has them."""
    return sorted({int(t) for t in np.linspace(0, 1, steps) * timestep})


def sigmas_at(model_sampling: Any, timesteps: Sequence[int]) -> Tensor:
    """Noise levels of timesteps (of flow models, of 999ths of their diffusion time); at 0 the least there is."""
    least, most = float(model_sampling.sigma_min), float(model_sampling.sigma_max)
    sigmas = [float(model_sampling.percent_to_sigma(1.0 - t / LAST_TIMESTEP)) for t in timesteps]
    return torch.tensor([min(max(sigma, least), most) for sigma in sigmas])


def scale_at(model_sampling: Any, sigma: float) -> float:
    """z / x at a noise level: what the network's input is multiplied by."""
    ones = torch.ones(1, 1, 1, 1)
    return float(model_sampling.calculate_input(torch.tensor([sigma]), ones))


def as_noise(model_sampling: Any, x: Tensor, sigmas: Tensor) -> Tensor:
    """The noise from which a sampler of ComfyUI's, given an empty latent, begins at x on these falling sigmas."""
    first, most = float(sigmas[0]), float(model_sampling.sigma_max)
    whole = first > most or abs(first - most) <= 1e-5 * most  # as ComfyUI's samplers tell
    ones, nothing = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    return x / float(model_sampling.noise_scaling(torch.tensor(first).view(1, 1, 1, 1), ones, nothing, whole))
