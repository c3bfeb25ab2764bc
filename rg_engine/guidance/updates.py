"""How the latent moves, given the gradient of the loss. Every update is of z, the latent at the network's input scale."""

from __future__ import annotations

import torch
from torch import Tensor

from .pictures import spread

#: The paper's learning rate (readout_guidance configs, ``rg_weight``).
PAPER_LEARNING_RATE = 0.02


def rms_step(gradient: Tensor, length: float | Tensor) -> Tensor:
    """The move against the gradient, (B, C, H, W) as that, of RMS ``length`` in every picture (fast and norm_ratio mode).

    A picture whose gradient is zero or not finite does not move.
    """
    gradient = gradient.float()
    rms = spread(gradient.flatten(1).square().mean(1).sqrt(), gradient)
    usable = torch.isfinite(rms) & (rms > 0)
    return torch.where(usable, -length * gradient / torch.where(usable, rms, 1.0), 0.0)


#: Sketch-Guided Diffusion's beta (sec. 4).
PAPER_BETA = 1.6


def norm_ratio_length(z: Tensor, next_z: Tensor, strength: float) -> Tensor:
    """norm_ratio mode: the RMS length (B, 1, 1, 1) of a move, a share of the sampler's own step.

    Sketch-Guided Diffusion (arXiv 2211.13752), eq. 5-6: z moves by -alpha * gradient with alpha = |z_t - z_{t-1}| /
    |gradient| * beta, so its length is beta * |z_t - z_{t-1}|. strength 1 is the paper's beta, 1.6.
    """
    return PAPER_BETA * strength * spread((z - next_z).float().flatten(1).square().mean(1).sqrt(), z)


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
