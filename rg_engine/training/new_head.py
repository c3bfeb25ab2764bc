"""Heads with fresh weights."""

from __future__ import annotations

import torch
from torch import Tensor

from ..features import Backbone
from ..heads import AggregationNetwork, HeadSpec, PixelNetwork, ReadoutHead
from ..heads.aggregation import Activation
from ..heads.head import Network
from ..types import HeadKind

#: The range that maps of 0..1 are brought to, as the authors' pose and edge heads have it.
CONTROL_RANGE = (-0.5, 0.5)


def range_of(kind: HeadKind) -> tuple[float, float]:
    """The range of what a kind of head learns."""
    return (0.0, 1.0) if kind == "keypoint" else CONTROL_RANGE


def empty_value(kind: HeadKind, sparse: bool) -> float | None:
    """The background of sparse controls, as :func:`lesson_of` takes it; None for dense ones and other kinds."""
    return range_of(kind)[0] if sparse and kind in ("spatial", "keypoint") else None


def as_controls(maps: Tensor) -> Tensor:
    """Control pictures (N, C, h, w) in 0..1 as a spatial head learns them: in CONTROL_RANGE, grey ones in one channel."""
    if maps.shape[1] > 1 and torch.equal(maps, maps[:, :1].expand_as(maps)):
        maps = maps[:, :1]
    low, high = CONTROL_RANGE
    return low + (high - low) * maps.clamp(0, 1)


@torch.inference_mode(False)
def new_head(
    kind: HeadKind, backbone: Backbone, *, name: str, output_channels: int = 0, projection: int = 384, seed: int = 0,
    backbone_name: str | None = None, activation: Activation | None = None, training: dict | None = None,
) -> ReadoutHead:  # fmt: skip
    """A head of a kind for a backbone, at random weights that follow from ``seed``; frozen until it is trained.

    output_channels: of the maps that it learns (spatial, keypoint: the control's; lgp: the latent's; else 0). projection:
    channels of the mixed map, 384 as the authors', a multiple of 128. A correspondence head takes no timestep embedding, as
    the paper's.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "lgp":
            network: Network = PixelNetwork(backbone.channels, output_channels=output_channels)
        else:
            network = AggregationNetwork(
                backbone.channels,
                projection_channels=projection,
                hidden=max(32, projection // 4),
                emb_width=0 if kind == "correspondence" else backbone.emb_width,
                output_channels=output_channels,
                activation=activation or ("none" if kind == "keypoint" else "tanh"),
                patches=[1 if layout is None else layout.patch for layout in backbone.layouts],
            )
    spec = HeadSpec(
        kind=kind,
        feature_channels=backbone.channels,
        taps=backbone.taps,
        backbone=backbone_name or backbone.name,
        control_range=range_of(kind),
        use_emb=kind != "correspondence",
        activation=network.activation if isinstance(network, AggregationNetwork) else "none",
        training=training or {},
    )
    return ReadoutHead(network=network, spec=spec, name=name)
