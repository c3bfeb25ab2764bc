"""What is asked of a loaded model: its taps, whether a head fits it, the scale of its input, and heads beside it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ...features import Backbone, check_head_fits, detect_backbone
from ...heads import ReadoutHead


def backbone_of(model: Any) -> Backbone:
    """The taps of a ModelPatcher's network. Raises BackboneError if it has none that are known."""
    return detect_backbone(model.get_model_object("diffusion_model"))


def check_fits(head: ReadoutHead, backbone: Backbone) -> None:
    check_head_fits(
        backbone,
        head_name=head.name,
        trained_on=head.spec.backbone,
        feature_channels=head.spec.feature_channels,
        emb_width=head.emb_width,
    )


def input_scale(model: Any, sigma: Tensor, x: Tensor) -> Tensor:
    """z / x at this noise level, (B, 1, 1, 1): what the network's input is multiplied by."""
    ones = torch.ones_like(x[:, :1, :1, :1])
    return model.model_sampling.calculate_input(sigma.expand(x.shape[0]), ones)


@contextlib.contextmanager
def heads_on(heads: Sequence[ReadoutHead], device: torch.device) -> Iterator[None]:
    """The heads' weights on the model's device for the time of a run."""
    networks = {id(head): head.network for head in heads}.values()
    with torch.inference_mode(False):
        homes = [next(network.parameters()).device for network in networks]
        for network in networks:
            network.to(device)
    try:
        yield
    finally:
        with torch.inference_mode(False):
            for network, home in zip(networks, homes, strict=True):
                network.to(home)
