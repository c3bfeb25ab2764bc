"""How to train an orthogonal adapter."""

from __future__ import annotations

import dataclasses
import math

from ...errors import TrainingError
from ...training.loop import LoopSettings, Schedule
from ...training.settings import Precision, check_least, check_microbatches

#: Which layers learn, by what their names hold: the authors' subjects, their control, and every layer of the transformers.
LAYERS: dict[str, str] = {
    "attention": r"[._](attn\d?|attention|self_attn|cross_attn|img_attn|txt_attn)[._]",
    "attention and gates": r"[._](attn\d?|attention|self_attn|cross_attn|img_attn|txt_attn)[._]|[._]ff[._]net[._]0[._]proj$",
    "transformers": r"(transformer_blocks|layers|double_blocks|single_blocks|joint_blocks|blocks)[._]\d+[._]",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class OftSettings:
    """The authors' defaults, but for the batch.

    blocks: of a layer (the authors' r); block_size: their size instead, 0 for by number. coft_eps: how far COFT lets each
    block go, in the authors' meaning, |R_i| <= eps b^2 / sqrt(n); 0 for plain OFT. layers: a key of LAYERS. prior_weight: of
    the class pictures' loss. validation_share: of the pictures, kept back. The rest as in LoopSettings and TrainingSettings.
    Raises TrainingError for a value out of range.
    """

    steps: int = 1000
    batch: int = 2
    learning_rate: float = 6e-5
    blocks: int = 4
    block_size: int = 0
    coft_eps: float = 0.0
    layers: str = "attention"
    prior_weight: float = 1.0
    weight_decay: float = 0.01
    clip: float = 1.0
    accumulate: int = 1
    warm_up: int = 20
    ema: float = 0.99
    schedule: Schedule = "cosine"
    precision: Precision = "fp32"
    validation_share: float = 0.0
    validate_every: int = 100
    patience: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch", 1), ("blocks", 1), ("block_size", 0), ("accumulate", 1), ("warm_up", 1),
                            ("validate_every", 0), ("patience", 0), ("seed", 0)):  # fmt: skip
            check_least(self, name, least)
        for name, high in (("learning_rate", 10.0), ("coft_eps", math.inf), ("prior_weight", math.inf),
                           ("weight_decay", 1.0), ("ema", 1.0), ("validation_share", 0.5)):  # fmt: skip
            value = getattr(self, name)
            if not 0 <= value <= high or math.isinf(value):
                raise TrainingError(f"{name} is {value:g}: it must be between 0 and {high:g}")
        if self.layers not in LAYERS:
            raise TrainingError(f"layers is {self.layers!r}: expected one of {', '.join(LAYERS)}")
        if self.block_size == 1:
            raise TrainingError(
                "block_size is 1, and a block of one number turns nothing: give 2 or more, or 0 for by number"
            )
        check_microbatches(self.batch, self.accumulate)

    @property
    def loop(self) -> LoopSettings:
        shared = [field.name for field in dataclasses.fields(LoopSettings) if hasattr(self, field.name)]
        return LoopSettings(**{name: getattr(self, name) for name in shared})

    def divided(self, width: int) -> tuple[int, int]:
        """How many blocks of which size for a layer of this width: the nearest that divides it, the smaller of two."""
        wanted = self.block_size or max(width / self.blocks, 2)
        sizes = [size for size in range(2, width + 1) if width % size == 0]
        size = min(sizes, key=lambda size: (abs(math.log(size / wanted)), size))
        return width // size, size
