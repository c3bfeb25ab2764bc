"""How to train a head."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, get_args

from ..errors import TrainingError
from ..heads.head import TimestepConvention

Precision = Literal["fp32", "bf16", "fp16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """steps: optimiser steps; batch: examples in each, over all microbatches and processes; learning_rate: AdamW's, after
    a short warm-up, falling to 0 as a cosine.

    accumulate: microbatches a step. ema: decay of the weights' moving average, which is what a training gives.
    precision: of the head's arithmetic (its weights stay fp32). shift: examples are moved about by up to so much of the
    picture. noise_draws: noise and timestep are drawn anew for every step (0), or so many times for each example, whose
    features are then kept (see :mod:`.draws`). timestep_convention: ``t``, the embedding of the timestep, or ``reversed``,
    that of 999 - t, as the authors' training does. validation_share: of the examples, kept back. validate_every: steps
    between validations, 0 for never. patience: validations without a better one before training ends, 0 for no end. seed: of
    everything random.
    Raises TrainingError for a value out of range.
    """

    steps: int = 1500
    batch: int = 8
    learning_rate: float = 2e-3
    accumulate: int = 1
    ema: float = 0.99
    precision: Precision = "fp32"
    shift: float = 0.0
    noise_draws: int = 0
    timestep_convention: TimestepConvention = "t"
    validation_share: float = 0.1
    validate_every: int = 100
    patience: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch", 1), ("accumulate", 1), ("noise_draws", 0), ("validate_every", 0),
                            ("patience", 0), ("seed", 0)):  # fmt: skip
            check_least(self, name, least)
        for name, low, high in (
            ("learning_rate", 0.0, 1.0),
            ("ema", 0.0, 1.0),
            ("shift", -1.0, 0.5),
            ("validation_share", -1.0, 0.5),
        ):
            value = getattr(self, name)
            if not (math.isfinite(value) and (low < value <= high if low == 0 else 0 <= value <= high)):
                raise TrainingError(
                    f"{name} is {value:g}: it must be between 0 and {high:g}{', and not 0' if low == 0 else ''}"
                )
        for name, allowed in (("precision", get_args(Precision)), ("timestep_convention", get_args(TimestepConvention))):
            if getattr(self, name) not in allowed:
                raise TrainingError(f"{name} {getattr(self, name)!r} is unknown: expected one of {', '.join(allowed)}")
        check_microbatches(self.batch, self.accumulate)


def check_least(settings: object, name: str, least: int) -> None:
    """Raises TrainingError for a setting below its least value."""
    if getattr(settings, name) < least:
        raise TrainingError(f"{name} is {getattr(settings, name)}: it must be {least} or more")


def check_microbatches(batch: int, accumulate: int) -> None:
    """Raises TrainingError unless a batch divides into so many parts."""
    if batch % accumulate:
        raise TrainingError(f"a batch of {batch} can't be divided into {accumulate} microbatches")
