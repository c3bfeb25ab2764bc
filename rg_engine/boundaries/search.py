"""The mixing step: what the paper reads off norms, and a search that measures.

The paper takes the step at which latents leave the sphere that noise lies on; its code prints their mean norms
and leaves the choice to the reader. The search chooses among steps that were tried on pictures kept back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import Tensor

STEPS_TRIED = (200, 300, 400, 500, 600, 700)
#: Of the flip rate: steps that flip nearly as many pictures as the best count as equals.
NEAR_BEST = 0.05
#: Where fewer flip at every step, which one does so most is chance.
FEW = 0.5
#: Of the change elsewhere: a latent changes a little more the higher the step, also where the picture's pixels do not, so
#: steps within so much of the least are equals.
NEAR_LEAST = 0.25
#: Among equals the nearest to this one is taken. On the demo world it is the best, or nearly so, for every attribute.
FAVOURED_STEP = 400


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tried:
    """A mixing step and what was measured there. norm: mean |z| of the pictures; radius: of latents sampled from noise.

    flip: share of pictures kept back that show the other value after a move to it; change: RMS difference elsewhere from the
    picture's own way back, as a part of the latent's RMS. None where no pictures were kept back.
    """

    step: int
    accuracy: dict[str, float]
    norm: float
    radius: float | None = None
    flip: float | None = None
    change: float | None = None


def mean_norm(z: Tensor) -> float:
    """Mean norm |z_t| of latents (B, ...): what the paper's code prints by step; sqrt of their size for noise."""
    return float(z.flatten(1).norm(dim=1).mean())


def best_of(tried: Sequence[Tried]) -> Tried:
    """The step with the smallest change elsewhere among those that flip, or its equal that lies nearest to FAVOURED_STEP."""
    equals = list(tried)
    measured = [each for each in tried if each.flip is not None and each.change is not None]
    if measured:
        most = max(each.flip or 0.0 for each in measured)
        enough = most - NEAR_BEST if most >= FEW else 0.0
        flipping = [each for each in measured if (each.flip or 0.0) >= enough]
        least = min(each.change or 0.0 for each in flipping)
        equals = [each for each in flipping if (each.change or 0.0) <= least * (1 + NEAR_LEAST)]
    return min(equals, key=lambda each: abs(each.step - FAVOURED_STEP))
