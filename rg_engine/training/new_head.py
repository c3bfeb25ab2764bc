"""Heads with fresh weights."""

from __future__ import annotations

import torch

from ..features import Backbone
from ..heads import AggregationNetwork, HeadSpec, PixelNetwork, ReadoutHead
from ..heads.aggregation import Activation
from ..heads.head import Network
from ..types import HeadKind

#: The range that maps of 0..1 are brought to, as the authors' pose and edge heads have it.
CONTROL_RANGE = (-0.5, 0.5)


@torch.inference_mode(False)
def new_head(
    kind: HeadKind, backbone: Backbone, *, name: str, output_channels: int = 0, projection: int = 384, seed: int = 0,
    backbone_name: str | None = None, activation: Activation | None = None, training: dict | None = None,
) -> ReadoutHead:  # fmt: skip
    """A head of a kind for a backbone, at random weights that follow from ``seed``.

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
            )
    spec = HeadSpec(
        kind=kind,
        feature_channels=backbone.channels,
        taps=backbone.taps,
        backbone=backbone_name or backbone.name,
        control_range=(0.0, 1.0) if kind == "keypoint" else CONTROL_RANGE,
        use_emb=kind != "correspondence",
        activation=network.activation if isinstance(network, AggregationNetwork) else "none",
        training=training or {},
    )
    return ReadoutHead(network=network, spec=spec, name=name)
