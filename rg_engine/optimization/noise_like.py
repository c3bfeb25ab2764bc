"""What keeps a latent that is optimized the noise that the model expects, and figures that show whether it is."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .pixels import at_least_fp32

#: norm: its length, as DOODL and ReNO do; white: its power in each ring of frequencies; none: nothing.
Keep = Literal["norm", "white", "none"]
RINGS = 8


class Keeper:
    """Puts a latent (..., C, H, W) back to what it was like at the start; each picture by itself."""

    def __init__(self, start: Tensor, keep: Keep) -> None:
        self._keep = keep
        self._start = _power(start) if keep == "white" else _norm(start)

    def __call__(self, z: Tensor) -> Tensor:
        if self._keep == "none":
            return z
        if self._keep == "norm":
            return z * (self._start / _norm(z).clamp(min=1e-12))
        return _with_power(z, self._start)


def _norm(z: Tensor) -> Tensor:
    return z.flatten(-3).norm(dim=-1)[..., None, None, None]


def _rings(z: Tensor) -> Tensor:
    """To which ring each frequency of the real Fourier transform belongs, (H, W // 2 + 1), 0 to RINGS - 1. Frequency 0 is
    with the lowest ones."""
    height, width = z.shape[-2:]
    up, across = torch.fft.fftfreq(height, device=z.device), torch.fft.rfftfreq(width, device=z.device)
    radius = (up[:, None].square() + across[None].square()).sqrt()
    return (radius / radius.max() * RINGS).long().clamp(max=RINGS - 1)


def _power(z: Tensor) -> Tensor:
    """The power of each channel's rings, (..., C, RINGS); their sum is that of all cells, times H W."""
    power = torch.fft.rfft2(at_least_fp32(z)).abs().square()
    mirrored = slice(1, (z.shape[-1] + 1) // 2)  # columns whose mirror images a real transform leaves out
    power[..., mirrored] *= 2
    return power.new_zeros(*z.shape[:-2], RINGS).index_add(-1, _rings(z).flatten(), power.flatten(-2))


def _with_power(z: Tensor, wanted: Tensor) -> Tensor:
    """The nearest latent whose rings have this power: each ring of its spectrum made longer or shorter.

    As the projection of arXiv 2602.08646 keeps the length of blocks of the spectrum; here blocks are rings, and their length
    is that of the noise one began with, so that noise that has not moved is not changed.
    """
    scale = (wanted / _power(z).clamp(min=1e-20)).sqrt()[..., _rings(z)]  # (..., C, H, W // 2 + 1)
    return torch.fft.irfft2(torch.fft.rfft2(at_least_fp32(z)) * scale, s=z.shape[-2:]).to(z.dtype)


def statistics(z: Tensor) -> dict[str, float]:
    """Over all pictures: rms (1 for white noise), the correlation of neighbouring cells (0), and the excess kurtosis (0)."""
    z = z.detach().cpu().double()
    spread = z - z.mean()
    power = spread.square().mean().clamp(min=1e-20)
    beside = (spread[..., :, 1:] * spread[..., :, :-1]).mean() + (spread[..., 1:, :] * spread[..., :-1, :]).mean()
    kurtosis = spread.pow(4).mean() / power.square() - 3
    return {
        "rms": float(z.square().mean().sqrt()),
        "neighbours": float(beside / 2 / power),
        "kurtosis": float(kurtosis),
    }
