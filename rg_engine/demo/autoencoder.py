"""The demo model's autoencoder: 8 pixels a cell, 8 channels, small enough to train in minutes on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LATENT_CHANNELS = 8
DOWNSCALE = 8


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(F.silu(self.norm(x)))))


class Autoencoder(nn.Module):
    """Encodes pictures (B, 3, H, W) in -1..1 to latents (B, 8, H/8, W/8) of mean 0 and deviation 1 a channel, and back.

    H and W are multiples of 8. ``mean`` and ``std`` are measured once, after training (:meth:`normalise`).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        w = width
        self.encoder = nn.Sequential(
            nn.Conv2d(3, w, 4, stride=2, padding=1), nn.SiLU(),
            nn.Conv2d(w, 2 * w, 4, stride=2, padding=1), Residual(2 * w),
            nn.Conv2d(2 * w, 4 * w, 4, stride=2, padding=1), Residual(4 * w), Residual(4 * w),
            nn.GroupNorm(8, 4 * w), nn.SiLU(), nn.Conv2d(4 * w, LATENT_CHANNELS, 1),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Conv2d(LATENT_CHANNELS, 4 * w, 3, padding=1), Residual(4 * w), Residual(4 * w),
            nn.Conv2d(4 * w, 8 * w, 3, padding=1), nn.PixelShuffle(2), Residual(2 * w),
            nn.Conv2d(2 * w, 4 * w, 3, padding=1), nn.PixelShuffle(2), Residual(w),
            nn.GroupNorm(8, w), nn.SiLU(), nn.Conv2d(w, 12, 3, padding=1), nn.PixelShuffle(2),
        )  # fmt: skip
        self.register_buffer("mean", torch.zeros(1, LATENT_CHANNELS, 1, 1))
        self.register_buffer("std", torch.ones(1, LATENT_CHANNELS, 1, 1))

    def encode(self, pictures: Tensor) -> Tensor:
        return (self.encoder(pictures) - self.mean) / self.std

    def decode(self, latents: Tensor) -> Tensor:
        return self.decoder(latents * self.std + self.mean)

    @torch.no_grad()
    def normalise(self, pictures: Tensor) -> None:
        """Set ``mean`` and ``std`` so that these pictures' latents are standardised."""
        z = self.encoder(pictures)
        self.mean.copy_(z.mean((0, 2, 3), keepdim=True))
        self.std.copy_(z.std((0, 2, 3), keepdim=True))


def loss(model: Autoencoder, pictures: Tensor, noise: Tensor) -> Tensor:
    """Reconstruction of pictures (B, 3, H, W) in -1..1 from slightly noisy latents, noise (B, 8, H/8, W/8): L1 on colours
    and on their differences between neighbours (edges)."""
    z = model.encoder(pictures)
    drift = z.mean((0, 2, 3)).square().mean() + (z.std((0, 2, 3)) - 1).square().mean()
    rebuilt = model.decoder(z + noise).float()
    error = rebuilt - pictures
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + edges + 0.01 * drift
