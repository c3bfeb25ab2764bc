"""The engine by itself: these tests import ``rg_engine`` directly and need no ComfyUI."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

REPOSITORY = str(Path(__file__).resolve().parents[2])
if REPOSITORY not in sys.path:
    sys.path.append(REPOSITORY)  # last, so that this extension's `nodes` never shadows ComfyUI's

CHANNELS, EMB_WIDTH = (8, 12, 32), 10


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def make_head() -> Callable:
    """Makes small heads with random weights of the sizes of ``make_features``."""
    from rg_engine.heads import AggregationNetwork, HeadSpec, ReadoutHead

    def make(kind="spatial", *, output_channels=None, emb_width=EMB_WIDTH, seed=0, name="a_head", **spec):
        if output_channels is None:
            output_channels = 3 if kind == "spatial" else 0
        generator = torch.Generator().manual_seed(seed)
        network = AggregationNetwork(
            CHANNELS, projection_channels=32, hidden=32, emb_width=emb_width, output_channels=output_channels,
            activation=spec.get("activation", "tanh"),
        )  # fmt: skip
        for parameter in network.eval().requires_grad_(False).parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        return ReadoutHead(network=network, spec=HeadSpec(kind=kind, feature_channels=CHANNELS, **spec), name=name)

    return make


@pytest.fixture
def make_features() -> Callable:
    """Makes features of three sizes and an emb: ``features, emb = make_features(batch)``."""

    def make(batch=1, seed=0):
        generator = torch.Generator().manual_seed(seed)
        maps = [torch.randn(batch, c, s, s, generator=generator) for c, s in zip(CHANNELS, (2, 4, 8), strict=True)]
        return maps, torch.randn(batch, EMB_WIDTH, generator=generator)

    return make
