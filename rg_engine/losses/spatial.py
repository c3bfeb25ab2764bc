"""Spatial control: the readout should look like the control (Readout Guidance, arXiv 2312.02150, eq. 2)."""

from __future__ import annotations

from torch import Tensor

from .regions import weighted_mean


def spatial_loss(
    readout: Tensor, control: Tensor, *, control_range: tuple[float, float], z_extent: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Mean squared error after mapping both from ``control_range`` to (min z, max z), as the paper's code does.

    The mapping is affine, so it multiplies the error by the ratio of the two extents.

    Args: readout, control (B, D, H, W) in control_range; z_extent (B,), max z - min z; mask (B, 1, H, W) in 0..1.
    Returns: (B,).
    """
    low, high = control_range
    gain = z_extent / (high - low)
    return weighted_mean((readout - control).square(), mask) * gain.square()
