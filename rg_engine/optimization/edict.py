"""EDICT: two coupled latents whose sampling can be undone exactly (Wallace et al., CVPR 2023, arXiv 2211.12446; as DOODL's
code runs it). The reference way; a single latent and any sampler serve as well, see :mod:`.update`.

Letters: x, y the pair, (B, C, H, W) each, at the network's input scale z; i the step, 0 is the noisiest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

MIXING = 0.93
#: The noise that the network sees in z at step i, (B, C, H, W).
Predict = Callable[[Tensor, int], Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Levels:
    """The noise levels of N steps, (N + 1,) each: sigma, and scale, z / x there (VP: sqrt(alpha), flow: 1)."""

    sigma: tuple[float, ...]
    scale: tuple[float, ...]

    @property
    def steps(self) -> int:
        return len(self.sigma) - 1


def authors_levels(alphas_cumprod: Tensor, steps: int) -> tuple[list[int], Levels]:
    """DDIM timesteps N-1-i times (1000 // N), and their levels; after the last step comes alphas_cumprod[0], so that the
    last step, t = 0, only mixes. ``steps`` should divide 1000."""
    times = [(steps - 1 - i) * (len(alphas_cumprod) // steps) for i in range(steps)]
    alphas = [float(alphas_cumprod[t]) for t in times] + [float(alphas_cumprod[0])]
    return times, Levels(sigma=tuple(((1 - a) / a) ** 0.5 for a in alphas), scale=tuple(a**0.5 for a in alphas))


def ddim(z: Tensor, eps: Tensor, levels: Levels, i: int) -> Tensor:
    """DDIM's step (eta 0) from level i to i + 1 by the noise eps that is in z; Euler's step in x."""
    a, b = _factors(levels, i)
    return a * z + b * eps


def undo_ddim(z: Tensor, eps: Tensor, levels: Levels, i: int) -> Tensor:
    a, b = _factors(levels, i)
    return (z - b * eps) / a


def _factors(levels: Levels, i: int) -> tuple[float, float]:
    a = levels.scale[i + 1] / levels.scale[i]
    return a, levels.scale[i + 1] * (levels.sigma[i + 1] - levels.sigma[i])


def step(x: Tensor, y: Tensor, predict: Predict, levels: Levels, i: int) -> tuple[Tensor, Tensor]:
    """Both of the pair one step down, each by the other's noise; who is first changes from step to step."""
    first, other = (x, y) if i % 2 == 0 else (y, x)
    first = ddim(first, predict(other, i), levels, i)
    other = ddim(other, predict(first, i), levels, i)
    return (first, other) if i % 2 == 0 else (other, first)


def unstep(x: Tensor, y: Tensor, predict: Predict, levels: Levels, i: int) -> tuple[Tensor, Tensor]:
    """:func:`step` undone."""
    first, other = (x, y) if i % 2 == 0 else (y, x)
    other = undo_ddim(other, predict(first, i), levels, i)
    first = undo_ddim(first, predict(other, i), levels, i)
    return (first, other) if i % 2 == 0 else (other, first)


def mix(x: Tensor, y: Tensor, p: float = MIXING) -> tuple[Tensor, Tensor]:
    x = p * x + (1 - p) * y
    return x, (1 - p) * x + p * y


def unmix(x: Tensor, y: Tensor, p: float = MIXING) -> tuple[Tensor, Tensor]:
    y = (y - (1 - p) * x) / p
    return (x - (1 - p) * y) / p, y


def sample_pair(x: Tensor, y: Tensor, predict: Predict, levels: Levels, p: float = MIXING) -> tuple[Tensor, Tensor]:
    """From noise to pictures."""
    for i in range(levels.steps):
        x, y = mix(*step(x, y, predict, levels, i), p)
    return x, y


def invert_pair(x: Tensor, y: Tensor, predict: Predict, levels: Levels, p: float = MIXING) -> tuple[Tensor, Tensor]:
    """From pictures to the noise that they come from, exactly."""
    for i in reversed(range(levels.steps)):
        x, y = unstep(*unmix(x, y, p), predict, levels, i)
    return x, y


def pair_of(z: Tensor) -> Tensor:
    """(B, C, H, W) twice, (2, B, C, H, W)."""
    return torch.stack([z, z])
