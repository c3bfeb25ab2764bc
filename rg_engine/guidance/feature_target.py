"""Targets in feature space: where the features should go for a head to read what is asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

#: A step's length is at most this part of the features' own. Trained heads take steps of 0.01 to 0.15 of it; one whose loss
#: does not get near 0 would be sent further than it has ever seen.
LONGEST = 0.25


def feature_gap(
    features: Tensor, first: tuple[Tensor, Tensor], evaluate: Callable[[Tensor], tuple[Tensor, Tensor, Any]], steps: int
) -> Tensor:
    """How far features (B, N), all of a picture's maps in a row, are from where the loss would be least, (B, N).

    With L the loss as a function of the features f alone, g its gradient, each picture by itself, ``steps`` times

        f <- f - L(f) / |g(f)|^2  g(f)

    which is Polyak's step for a loss whose least value is 0 ("Minimization of unsmooth functionals", 1969): it needs no
    length, and what multiplies the loss changes nothing. No step is longer than LONGEST of |f|. The gap is where f began
    less where it ends. Handed to the network's backward in the gradient's place it gives J^T (f - f*), J the derivative of
    the features with respect to z: the gradient of |f(z) - f*|^2 / 2. One step is the gradient itself, but for its length.
    Only the head runs again, forward and backward ``steps`` - 1 times.

    Args: first, loss (B,) and gradient (B, N) at the features; evaluate(features) gives them elsewhere, and more. A picture
    whose loss or gradient is not finite, or whose gradient is 0, stays where it is.
    """
    gap = torch.zeros_like(features)
    longest = LONGEST * features.norm(dim=1)
    loss, gradient = first
    for step in range(steps):
        if step:
            loss, gradient = evaluate(features - gap)[:2]
        norm = gradient.norm(dim=1)
        length = torch.minimum(loss / norm.square(), longest / norm)[:, None]
        gap += torch.where(torch.isfinite(length) & (length != 0), length * gradient, 0.0)
    return gap
