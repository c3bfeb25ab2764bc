"""The embedding that heads on transformers take: of the noise level, made here.

The networks' own ones have no common form: there may be none, a row a token, two rows a picture, or time may run backwards.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

NOISE_EMBEDDING_WIDTH = 256
LONGEST = 10_000.0


def noise_embedding(noise_level: Tensor) -> Tensor:
    """Cosines and sines (B, 256) of 1000 times the noise level (B,) in 0..1, as 1706.03762 embeds places."""
    half = NOISE_EMBEDDING_WIDTH // 2
    rates = torch.exp(-math.log(LONGEST) * torch.arange(half, device=noise_level.device, dtype=torch.float32) / half)
    angles = 1000.0 * noise_level.float()[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], 1)
