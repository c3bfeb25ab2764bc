"""A training whose answer is known: the model's features are a fixed projection of the noised latents.

What is true about a picture follows from its latent, so a head can learn it; every number follows from a seed, and a
picture's features do not depend on the others of its batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from rg_engine.features import Backbone
from rg_engine.training import Draw, Examples, HeadTraining, Reading, TrainingSettings, in_a_row, lesson_of, new_head

BACKBONE = Backbone(name="projection", taps=("full", "half"), channels=(8, 6), emb_tap="emb", emb_width=2)
SIZE, LATENT_CHANNELS = (8, 8), 4
KINDS = ("spatial", "keypoint", "lgp", "correspondence", "appearance")
OUTPUT_CHANNELS = {"spatial": 2, "keypoint": 2, "lgp": LATENT_CHANNELS}


def examples(kind: str = "spatial", count: int = 12) -> Examples:
    """Pictures of random cells: their map follows from the latent, the second of a pair is the first moved by a cell,
    and the last of a triplet is the negative of the others.
    """
    generator = torch.Generator().manual_seed(count)
    one_each = torch.randn(count, LATENT_CHANNELS, *SIZE, generator=generator)
    if kind == "correspondence":
        pairs = torch.stack([one_each, one_each.roll((1, 1), (2, 3))], 1)
        cells = torch.rand(count, 6, 2, generator=generator).mul(SIZE[0] - 1).floor()  # never the last row or column
        tracks = (torch.stack([cells, cells + 1], 2) + 0.5) / SIZE[0]  # (N, P, 2, 2)
        return in_a_row("correspondence", pairs.flatten(0, 1), tracks)
    if kind == "appearance":
        look = torch.randn(count, 1, LATENT_CHANNELS, 1, 1, generator=generator)
        triplets = torch.cat([look, look, -look], 1) * one_each[:, None, :1].abs()
        return in_a_row("appearance", triplets.flatten(0, 1), None)
    truth = one_each if kind == "lgp" else 0.5 * one_each[:, :2].tanh()
    return in_a_row(kind, one_each, truth)  # type: ignore[arg-type]


def read(draw: Draw) -> Reading:
    """Features of each picture by itself: bit for bit the same in any batch."""
    time = draw.time.repeat_interleave(draw.latents.shape[1])
    z = draw.latents.flatten(0, 1) + 0.2 * time[:, None, None, None] * draw.noise.flatten(0, 1)
    features = []
    for channels in BACKBONE.channels:
        mix = torch.randn(channels, LATENT_CHANNELS, generator=torch.Generator().manual_seed(channels))
        features.append(sum(mix[:, c, None, None] * z[:, c, None] for c in range(LATENT_CHANNELS)))
    features[1] = F.avg_pool2d(features[1], 2)
    return Reading(features=features, emb=torch.stack([time.cos(), time.sin()], 1), noise_level=time)


def settings(**changed: Any) -> TrainingSettings:
    return TrainingSettings(**{"steps": 4, "batch": 4, "validate_every": 0, "ema": 0.7, **changed})


def training(kind: str = "spatial", *, weights: int = 0, given: Examples | None = None, **more: Any) -> HeadTraining:
    """A small head of a kind in training. ``weights`` is the seed of those that it starts with; ``more`` are settings, or
    HeadTraining's own arguments.
    """
    own = {key: more.pop(key) for key in ("checkpoint", "ranks", "lesson", "reading", "head") if key in more}
    head = own.pop("head", None) or new_head(
        kind, BACKBONE, name="a head", output_channels=OUTPUT_CHANNELS.get(kind, 0), projection=32, seed=weights,
        training={"control": "cells"},
    )  # fmt: skip
    lesson, reading = own.pop("lesson", None) or lesson_of(kind), own.pop("reading", read)
    return HeadTraining(head, lesson, given or examples(kind), reading, settings(**more), **own)
