"""Targets in feature space: where the features should go for a head to read what is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .pictures import spread

#: The loss of each picture (B,) and its gradients with respect to maps (B, C_i, H_i, W_i).
LossAndGradients = tuple[Tensor, list[Tensor]]
#: A step's length is at most this part of the features' own. Trained heads take steps of 0.01 to 0.15 of it; one whose loss
#: does not get near 0 would be sent further than it has ever seen.
LONGEST = 0.25


def feature_gap(
    features: Sequence[Tensor], first: LossAndGradients, evaluate: Callable[[list[Tensor]], LossAndGradients], steps: int
) -> list[Tensor]:
    """How far the features are from where the loss would be least, maps (B, C_i, H_i, W_i) as they are.

    With L the loss as a function of the features f alone, g its gradient, each picture by itself, ``steps`` times

        f <- f - L(f) / |g(f)|^2  g(f)

    which is Polyak's step for a loss whose least value is 0 ("Minimization of unsmooth functionals", 1969): it needs no
    length, and what multiplies the loss changes nothing. No step is longer than LONGEST of |f|. The gap is where f began
    less where it ends. Handed to the network's backward in the gradient's place it gives J^T (f - f*), J the derivative of
    the features with respect to z: the gradient of |f(z) - f*|^2 / 2. One step is the gradient itself, but for its length.
    Only the head runs again, forward and backward ``steps`` - 1 times.

    Args: first, loss and gradients at the features; evaluate(maps) gives them elsewhere. A picture whose loss or gradient
    is not finite, or whose gradient is 0, stays where it is.
    """
    gap = [torch.zeros_like(map_) for map_ in features]
    longest = LONGEST * _squared(features).sqrt()
    loss, gradients = first
    for step in range(steps):
        if step:
            loss, gradients = evaluate([map_ - moved for map_, moved in zip(features, gap, strict=True)])
        squared = _squared(gradients)
        length = torch.minimum(loss / squared, longest / squared.sqrt())
        length = torch.where(torch.isfinite(length) & (squared > 0), length, 0.0)
        for moved, gradient in zip(gap, gradients, strict=True):
            each = spread(length, gradient)
            moved += torch.where(each != 0, each * gradient, 0.0)
    return gap


def _squared(maps: Sequence[Tensor]) -> Tensor:
    """The squared norm over all maps, (B,)."""
    return torch.stack([map_.flatten(1).square().sum(1) for map_ in maps]).sum(0)
