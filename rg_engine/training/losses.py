"""What heads learn from."""

from __future__ import annotations

from torch import Tensor


def balanced_mse(readout: Tensor, control: Tensor, *, background: float | None = None, tolerance: float = 1e-3) -> Tensor:
    """Mean squared error; for sparse controls the background's and the foreground's means count alike.

    As the authors' training does for pose and edges, where most of a control is background (readout_training,
    ``sparse_loss``). Args: readout, control (B, D, H, W); background, the control's empty value, or None for dense ones.
    """
    error = (readout.float() - control).square()
    if background is None:
        return error.mean()
    empty = (control - background).abs() <= tolerance
    foreground, empty_count = ~empty, empty.sum()
    if empty_count == 0 or foreground.sum() == 0:
        return error.mean()
    return (error[empty].mean() + error[foreground].mean()) / 2
