"""Sketch: the predicted edges should be the sketch's (Sketch-Guided Diffusion, arXiv 2211.13752, eq. 4)."""

from __future__ import annotations

from torch import Tensor

from .regions import weighted_mean


def sketch_loss(readout: Tensor, sketch: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Mean squared error of encoded edges. Args: readout, sketch (B, C, H, W); mask (B, 1, H, W) in 0..1. Returns: (B,)."""
    return weighted_mean((readout - sketch).square(), mask)
