"""Appearance: the readout should equal the reference's at each place (Readout Guidance, arXiv 2312.02150, sec. 3.3)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from .regions import weighted_mean


def appearance_loss(readout: Tensor, reference: Tensor, *, z_extent: Tensor, mask: Tensor | None = None) -> Tensor:
    """mean(1 - cos) * (max z - min z)^2, as the paper's code computes it.

    Args: readout, reference (B, D, H, W); z_extent (B,); mask (B, 1, H, W) in 0..1. Returns: (B,).
    """
    distance = 1 - F.cosine_similarity(readout, reference, dim=1)  # (B, H, W)
    return weighted_mean(distance[:, None], mask) * z_extent.square()
