"""Correspondence: what was at the start of a drag should be at its end (Readout Guidance, arXiv 2312.02150, sec. 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

Window = tuple[float, float, float, float]  # left, top, width, height, as fractions of the picture


def correspondence_loss(
    readout: Tensor, source: Tensor, *, starts: Tensor, ends: Tensor, window: Window | None = None
) -> Tensor:
    """-0.5 mean S[source at start, readout at end] + 0.5 mean S[source at start, readout at start], S = (cos + 1)/2.

    The second term is the paper's anti-ghosting term: what moved should be gone from where it was. Anchors (drags without
    length) beside other drags do without it, since it would cancel the first. Only the points are gathered, never the
    HW x HW matrix of similarities.

    Args:
        readout, source: (B, D, H, W).
        starts, ends: (N, 2) of (x, y), fractions of the picture.
        window: what part of the picture readout shows; a term whose point lies outside of it is left out.
    Returns: (B,).
    """
    origin = gather(source, starts)  # (B, D, N)
    moving = (starts != ends).any(1)  # (N,)
    if window is not None:
        (starts, seen), (ends, reached) = within(starts, window), within(ends, window)
    arrived = F.cosine_similarity(origin, gather(readout, ends), dim=1)  # (B, N)
    stayed = F.cosine_similarity(origin, gather(readout, starts), dim=1)
    stayed = torch.where(moving | ~moving.any(), stayed, -1)
    if window is not None:
        arrived, stayed = torch.where(reached, arrived, -1), torch.where(seen, stayed, -1)
    return 0.5 * ((stayed + 1) / 2).mean(1) - 0.5 * ((arrived + 1) / 2).mean(1)


def within(points: Tensor, window: Window) -> tuple[Tensor, Tensor]:
    """Points (N, 2) as fractions of a window of their picture, and which of them lie in it, (N,)."""
    corner, size = points.new_tensor(window[:2]), points.new_tensor(window[2:])
    distance = points - corner
    inside = torch.where(distance < 0, distance + 1, distance) / size  # a window may reach over the edge
    return inside.clamp(0, 1), (inside <= 1).all(1)


def gather(maps: Tensor, points: Tensor) -> Tensor:
    """Values of ``maps`` (B, D, H, W) at ``points`` (N, 2) of (x, y) fractions -> (B, D, N).

    A cell's value sits at its centre; between centres it is interpolated, beyond the outermost ones it stays the same.
    """
    height, width = maps.shape[-2:]
    x, y = points[:, 0] * width, points[:, 1] * height
    x, y = (x - 0.5).clamp(0, width - 1), (y - 0.5).clamp(0, height - 1)
    left, top = x.floor().long(), y.floor().long()
    right, bottom = (left + 1).clamp_max(width - 1), (top + 1).clamp_max(height - 1)
    across, down = (x - left).to(maps.dtype), (y - top).to(maps.dtype)
    upper = maps[:, :, top, left] * (1 - across) + maps[:, :, top, right] * across
    lower = maps[:, :, bottom, left] * (1 - across) + maps[:, :, bottom, right] * across
    return upper * (1 - down) + lower * down


def cell_weights(points: Tensor, size: tuple[int, int]) -> Tensor:
    """How a map's cells share points (P, 2) of (x, y) fractions when interpolating between them, (P, H * W), rows of sum
    1."""
    height, width = size
    x, y = (points * torch.tensor([width, height], device=points.device, dtype=points.dtype) - 0.5).unbind(1)
    columns, rows = (torch.arange(count, device=points.device) for count in (width, height))
    across = (1 - (x.clamp(0, width - 1)[:, None] - columns).abs()).clamp_min(0)  # (P, W)
    down = (1 - (y.clamp(0, height - 1)[:, None] - rows).abs()).clamp_min(0)  # (P, H)
    return (down[:, :, None] * across[:, None]).flatten(1)
