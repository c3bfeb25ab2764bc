"""What a training step sees: which examples, how noisy, with which noise, moved where. All of it follows from the seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ..lessons import Truth, lesson_of
from ..settings import TrainingSettings
from .examples import Examples

STEP, KEPT, VALIDATION = range(3)  # what a random stream is for


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Draw:
    """Noised examples: latents, noise (N, K, C, h, w); pictures (N, K), their rows among all; truth (N, ...) or None.

    time (N,): parts of the diffusion time, 0 clean, 1 noise. keys: by which the features of an example can be kept.
    """

    latents: Tensor
    noise: Tensor
    time: Tensor
    pictures: Tensor
    truth: Tensor | None
    keys: tuple[tuple[int, int], ...] | None = None

    def rows(self, rows: Sequence[int]) -> Draw:
        """Some of its examples."""
        some = list(rows)
        return Draw(
            latents=self.latents[some], noise=self.noise[some], time=self.time[some], pictures=self.pictures[some],
            truth=None if self.truth is None else self.truth[some],
            keys=None if self.keys is None else tuple(self.keys[i] for i in some),
        )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Reading:
    """A frozen model's features of pictures: a list of (n, C_i, h_i, w_i), emb (n, E), noise_level (n,); without a graph."""

    features: list[Tensor]
    emb: Tensor
    noise_level: Tensor

    def on(self, device: torch.device) -> Reading:
        return Reading(
            features=[map_.to(device, torch.float32) for map_ in self.features],
            emb=self.emb.to(device, torch.float32),
            noise_level=self.noise_level.to(device),
        )


Read = Callable[[Draw], Reading]


def draw_step(examples: Examples, settings: TrainingSettings, step: int) -> Draw:
    """The draw of a step, the same whenever it is asked for: every epoch shows every example once, in another order.

    The times of a batch are spread evenly over the diffusion time.
    """
    places = step * settings.batch + np.arange(settings.batch)
    epochs = sorted(set((places // len(examples)).tolist()))
    orders = {epoch: _rng(settings, STEP, epoch).permutation(len(examples)) for epoch in epochs}
    rows = [int(orders[place // len(examples)][place % len(examples)]) for place in places.tolist()]
    rng = _rng(settings, STEP, step, 1)
    if settings.noise_draws:
        keys = tuple((row, int(rng.integers(settings.noise_draws))) for row in rows)
        times = [(number + _rng(settings, KEPT, row, number).random()) / settings.noise_draws for row, number in keys]
        return _draw(examples, settings, rows, times, [(KEPT, *key) for key in keys], keys)
    times = ((rng.permutation(settings.batch) + rng.random(settings.batch)) / settings.batch).tolist()
    return _draw(examples, settings, rows, times, [(STEP, step, 2 + j) for j in range(len(rows))])


def draw_validation(examples: Examples, settings: TrainingSettings, most: int = 64) -> Draw:
    """Always the same draw of up to ``most`` examples, times evenly spread."""
    rows = np.linspace(0, len(examples) - 1, min(most, len(examples))).round().astype(int).tolist()
    times = ((_rng(settings, VALIDATION).permutation(len(rows)) + 0.5) / len(rows)).tolist()
    still = dataclasses.replace(settings, shift=0.0)
    return _draw(examples, still, rows, times, [(VALIDATION, row) for row in rows])


def _draw(
    examples: Examples, settings: TrainingSettings, rows: list[int], times: list[float], streams: list[tuple[int, ...]],
    keys: tuple[tuple[int, int], ...] | None = None,
) -> Draw:  # fmt: skip
    latents, noises, truths = [], [], []
    kind = lesson_of(examples.kind).truth
    for row, stream in zip(rows, streams, strict=True):
        rng = _rng(settings, *stream, 1)
        pictures = examples.latents[examples.groups[row]].float()  # (K, C, h, w)
        noises.append(torch.randn(pictures.shape, generator=torch.Generator().manual_seed(int(rng.integers(2**62)))))
        truth = None if examples.truth is None else examples.truth[row].float()
        down, right = examples.cells
        shifts = [(_shift(rng, settings.shift, down), _shift(rng, settings.shift, right)) for _ in pictures]  # K of (dy, dx)
        latents.append(torch.stack([_moved(p, dy, dx) for p, (dy, dx) in zip(pictures, shifts, strict=True)]))
        if truth is not None:
            truths.append(_moved_truth(kind, truth, shifts, examples.cells))
    return Draw(
        latents=torch.stack(latents), noise=torch.stack(noises), time=torch.tensor(times, dtype=torch.float32),
        pictures=examples.groups[rows], truth=torch.stack(truths) if truths else None, keys=keys,
    )  # fmt: skip


class KeptFeatures:
    """Reads each draw that has keys once and keeps its features, in half precision, on the CPU."""

    def __init__(self, read: Read) -> None:
        self._read = read
        self._kept: dict[tuple[int, int], tuple[list[Tensor], Tensor, Tensor]] = {}

    def __call__(self, draw: Draw) -> Reading:
        if draw.keys is None:
            return self._read(draw)
        count = draw.latents.shape[1]
        new = [j for j, key in enumerate(draw.keys) if key not in self._kept and key not in draw.keys[:j]]
        if new:
            reading = self._read(draw.rows(new))
            for k, j in enumerate(new):
                rows = slice(k * count, (k + 1) * count)
                self._kept[draw.keys[j]] = (
                    [f[rows].to("cpu", torch.float16, copy=True) for f in reading.features],
                    reading.emb[rows].cpu().clone(),
                    reading.noise_level[rows].cpu().clone(),
                )
        found = [self._kept[key] for key in draw.keys]
        return Reading(
            features=[torch.cat(maps) for maps in zip(*(features for features, _, _ in found), strict=True)],
            emb=torch.cat([emb for _, emb, _ in found]),
            noise_level=torch.cat([level for _, _, level in found]),
        )


def _rng(settings: TrainingSettings, *stream: int) -> np.random.Generator:
    return np.random.default_rng([settings.seed, *map(int, stream)])


def _shift(rng: np.random.Generator, share: float, cells: int) -> int:
    most = round(share * cells)
    return int(rng.integers(-most, most + 1)) if most else 0


def _moved(picture: Tensor, down: int, right: int) -> Tensor:
    """(C, h, w) moved by so many cells; what comes in repeats the border."""
    if not down and not right:
        return picture
    height, width = picture.shape[-2:]
    rows, columns = (torch.arange(height) - down).clamp(0, height - 1), (torch.arange(width) - right).clamp(0, width - 1)
    return picture[:, rows][:, :, columns]


def _moved_truth(kind: Truth, truth: Tensor, shifts: list[tuple[int, int]], cells: tuple[int, int]) -> Tensor:
    if kind == "maps":
        return _moved(truth, *shifts[0])
    if kind == "tracks":
        return _moved_tracks(truth, shifts, cells)
    return torch.cat([_moved(region[None], dy, dx) for region, (dy, dx) in zip(truth, shifts, strict=True)])


def _moved_tracks(tracks: Tensor, shifts: list[tuple[int, int]], cells: tuple[int, int]) -> Tensor:
    """Tracks (P, 2, 2) of pictures that were moved; those that leave a picture become padding."""
    offset = torch.tensor([[dx / cells[1], dy / cells[0]] for dy, dx in shifts])  # (2, 2)
    moved = tracks + offset
    outside = ((moved < 0) | (moved > 1)).flatten(1).any(1)
    moved[outside] = float("nan")
    return moved
