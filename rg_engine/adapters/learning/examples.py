"""What an adapter learns from, and what of it a step sees, how noisy, with which noise: all of it follows from the seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ...errors import TrainingError

INSTANCE, PRIOR, VALIDATION = range(3)  # what a random stream is for
VALIDATION_DRAWS = 4


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Noisy:
    """latents and noise (N, C, h, w); time (N,), parts of the diffusion time; pictures (N,), their rows among all."""

    latents: Tensor
    noise: Tensor
    time: Tensor
    pictures: Tensor

    def rows(self, rows: Sequence[int]) -> Noisy:
        some = list(rows)
        return Noisy(**{field.name: getattr(self, field.name)[some] for field in dataclasses.fields(self)})


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class AdapterExamples:
    """latents (M, C, h, w) of the subject's pictures; of its class, for prior preservation. Raises TrainingError if they
    can't be learned from."""

    latents: Tensor
    class_latents: Tensor | None = None

    def __post_init__(self) -> None:
        for what, latents in (("the latents", self.latents), ("the class latents", self.class_latents)):
            if latents is None:
                continue
            if latents.ndim != 4 or not len(latents):
                raise TrainingError(f"{what} have the shape {tuple(latents.shape)}: expected pictures (n, channels, h, w)")
            if not torch.isfinite(latents).all():
                raise TrainingError(f"{what} hold NaN or infinite values: look at the node before")
        if self.class_latents is not None and self.class_latents.shape[1:] != self.latents.shape[1:]:
            raise TrainingError(
                f"the class latents are {tuple(self.class_latents.shape[1:])} and the latents "
                f"{tuple(self.latents.shape[1:])}: make both of one size, with one VAE"
            )

    def split(self, share: float) -> tuple[list[int], list[int]]:
        """Rows to learn from, and rows kept back: the last of them."""
        count = len(self.latents)
        kept = round(share * count)
        if share > 0 and not kept:
            raise TrainingError(f"validation_share {share:g} of {count} pictures is none: raise it, or set it to 0")
        return list(range(count - kept)), list(range(count - kept, count))

    def draw(self, step: int, batch: int, rows: Sequence[int], seed: int) -> Noisy:
        """The whole batch of a step: pictures in turn, each epoch in another order, with new noise."""
        return _noised(self.latents, _in_turn(step, batch, rows, (seed, INSTANCE)), (seed, INSTANCE, step))

    def draw_class(self, step: int, batch: int, seed: int) -> Noisy:
        assert self.class_latents is not None
        rows = _in_turn(step, batch, range(len(self.class_latents)), (seed, PRIOR))
        return _noised(self.class_latents, rows, (seed, PRIOR, step))

    def draw_validation(self, rows: Sequence[int], seed: int) -> Noisy:
        """Always the same: each picture at times that are spread evenly."""
        draw = _noised(self.latents, [row for row in rows for _ in range(VALIDATION_DRAWS)], (seed, VALIDATION))
        count = len(draw.time)
        order = torch.arange(count).view(-1, VALIDATION_DRAWS).T.flatten()  # a picture's times lie far apart
        return dataclasses.replace(draw, time=((torch.arange(count) + 0.5) / count)[order.argsort()])


def _in_turn(step: int, batch: int, rows: Sequence[int], stream: tuple[int, ...]) -> list[int]:
    orders: dict[int, np.ndarray] = {}
    picked = []
    for place in range(step * batch, (step + 1) * batch):
        epoch, at = divmod(place, len(rows))
        if epoch not in orders:
            orders[epoch] = np.random.default_rng((*stream, 7, epoch)).permutation(len(rows))
        picked.append(rows[int(orders[epoch][at])])
    return picked


def _noised(latents: Tensor, rows: Sequence[int], stream: tuple[int, ...]) -> Noisy:
    random = np.random.default_rng(stream)
    clean = latents[list(rows)]
    noise = torch.from_numpy(random.standard_normal(tuple(clean.shape), dtype=np.float32))
    time = torch.from_numpy(random.random(len(clean), dtype=np.float32))
    return Noisy(latents=clean, noise=noise, time=time, pictures=torch.tensor(list(rows)))
