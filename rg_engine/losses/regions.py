"""Means over a picture or a region of it."""

from __future__ import annotations

from torch import Tensor


def weighted_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over all but the first axis, weighted by ``mask``; 0 where the mask is empty.

    Args: values (B, D, H, W); mask (B, 1, H, W) in 0..1 or None. Returns: (B,).
    """
    if mask is None:
        return values.flatten(1).mean(1)
    total = mask.flatten(1).sum(1) * values.shape[1]
    return (values * mask).flatten(1).sum(1) / total.clamp_min(1e-6)
