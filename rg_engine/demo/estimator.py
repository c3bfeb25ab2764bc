"""Estimates pose and depth from finished pixels: the referee of the demo world.

It sees pictures only, never the model's features, and was trained on rendered pictures: nothing of the heads that
steered is in it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .autoencoder import Residual
from .world import JOINTS

HEATMAP_CELLS = 64


class Estimator(nn.Module):
    """Pictures (B, 3, 128, 128) in -1..1 to (joint heat maps (B, 14, 64, 64) as logits, disparity (B, 64, 64) in 0..1)."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        w = width
        self.stem = nn.Sequential(nn.Conv2d(3, w, 4, stride=2, padding=1), nn.SiLU(), Residual(w))  # 64
        self.down1 = nn.Sequential(nn.Conv2d(w, 2 * w, 4, stride=2, padding=1), Residual(2 * w))  # 32
        self.down2 = nn.Sequential(nn.Conv2d(2 * w, 4 * w, 4, stride=2, padding=1), Residual(4 * w))  # 16
        self.down3 = nn.Sequential(nn.Conv2d(4 * w, 4 * w, 4, stride=2, padding=1), Residual(4 * w), Residual(4 * w))  # 8
        self.up3 = nn.Conv2d(8 * w, 2 * w, 3, padding=1)
        self.up2 = nn.Sequential(nn.Conv2d(4 * w, 2 * w, 3, padding=1), nn.SiLU(), Residual(2 * w))
        self.up1 = nn.Sequential(nn.Conv2d(3 * w, w, 3, padding=1), nn.SiLU(), Residual(w))
        self.out = nn.Conv2d(w, len(JOINTS) + 1, 3, padding=1)

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        a = self.stem(pictures)
        b = self.down1(a)
        c = self.down2(b)
        d = self.down3(c)
        c = F.silu(self.up3(torch.cat([c, F.interpolate(d, scale_factor=2)], 1)))
        b = self.up2(torch.cat([b, F.interpolate(c, scale_factor=2)], 1))
        a = self.up1(torch.cat([a, F.interpolate(b, scale_factor=2)], 1))
        out = self.out(a)
        return out[:, :-1], torch.sigmoid(out[:, -1])


def joint_positions(heatmaps: Tensor) -> Tensor:
    """Expected position of each joint, (B, 14, 2) of (x, y) as fractions, from logits (B, 14, H, W)."""
    b, j, h, w = heatmaps.shape
    p = heatmaps.float().flatten(2).softmax(-1).view(b, j, h, w)
    xs = (torch.arange(w, device=p.device) + 0.5) / w
    ys = (torch.arange(h, device=p.device) + 0.5) / h
    return torch.stack([(p.sum(2) * xs).sum(-1), (p.sum(3) * ys).sum(-1)], -1)


def loss(prediction: tuple[Tensor, Tensor], joints: Tensor, depth: Tensor) -> Tensor:
    """Cross-entropy of each joint's heat map and its expected position's error (pictures with a figure), L1 of disparity.

    joints (B, 14, 2) in 0..1, nan where there is no figure; depth (B, 64, 64).
    """
    heatmaps, disparity = prediction
    error = (disparity.float() - depth.float()).abs().mean()
    seen = ~joints.isnan().any(-1).any(-1)
    if seen.any():
        cells = (joints[seen] * HEATMAP_CELLS).long().clamp(0, HEATMAP_CELLS - 1)  # (n, 14, 2)
        target = cells[..., 1] * HEATMAP_CELLS + cells[..., 0]
        logits = heatmaps[seen].float()
        error = error + 0.1 * F.cross_entropy(logits.flatten(2).flatten(0, 1), target.flatten())
        error = error + (joint_positions(logits) - joints[seen]).abs().mean()
    return error
