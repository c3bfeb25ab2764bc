"""ComfyUI's own sampling, guider and schedule nodes."""

from __future__ import annotations

import torch
from torch import Tensor

from .bench import CFG, SEED, STEPS, Bench, Guide
from .loading import node
from .trial import Combination


def ksampler(bench: Bench, guide: Guide) -> Tensor:
    return bench.ksampler(guide(bench.model))


COMBINATIONS = (
    Combination(nodes="KSampler", tried="euler", run=ksampler, same=True),
)
