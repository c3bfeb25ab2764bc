"""How the latent moves, given the gradient of the loss. Every update is of z, the latent at the network's input scale."""

from __future__ import annotations

import torch
from torch import Tensor

#: The paper's learning rate (readout_guidance configs, ``rg_weight``).
PAPER_LEARNING_RATE = 0.02


def rms_step(gradient: Tensor, length: float) -> Tensor:
    """Fast mode: the move (B, C, H, W) against the gradient, of RMS ``length`` in every picture.

    A picture whose gradient is zero or not finite does not move.
    """
    gradient = gradient.float()
    rms = gradient.flatten(1).square().mean(1).sqrt()[:, None, None, None]
    usable = torch.isfinite(rms) & (rms > 0)
    return torch.where(usable, -length * gradient / torch.where(usable, rms, 1.0), 0.0)


class ReferenceUpdate:
    """Reference mode: AdamW on z, fresh at every sampler step (Readout Guidance, sec. 3.4 and its code).

    Args: z (B, C, H, W), moved in place by :meth:`step`; strength multiplies the paper's learning rate.
    """

    def __init__(self, z: Tensor, strength: float) -> None:
        self.z = z.detach().clone().requires_grad_()
        self._optimiser = torch.optim.AdamW([self.z], lr=PAPER_LEARNING_RATE * strength, weight_decay=0.0)

    def step(self, gradient: Tensor) -> Tensor:
        """Move z by one update and return it, without a graph."""
        self.z.grad = torch.nan_to_num(gradient.to(self.z.dtype), nan=0.0, posinf=0.0, neginf=0.0)
        self._optimiser.step()
        self.z.grad = None
        return self.z.detach()
