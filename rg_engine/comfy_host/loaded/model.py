"""What is asked of a loaded model: its taps, whether a head fits it, the scale of its input, and heads beside it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import BackboneError
from ...features import Backbone, check_head_fits, detect_backbone
from ...heads import ReadoutHead
from .frozen_layers import plain


def backbone_of(model: Any) -> Backbone:
    """The taps of a ModelPatcher's network. Raises BackboneError if it has none that are known."""
    return detect_backbone(model.get_model_object("diffusion_model"))


def known_backbone(network: Any) -> Backbone | None:
    """The taps of a network, None if it has none that are known."""
    try:
        return detect_backbone(network)
    except BackboneError:
        return None


def check_fits(head: ReadoutHead, backbone: Backbone) -> Backbone:
    """The backbone tapped where the head reads. Raises BackboneError if it was trained on another kind of model."""
    return check_head_fits(
        backbone,
        head_name=head.name,
        trained_on=head.spec.backbone,
        feature_channels=head.spec.feature_channels,
        emb_width=head.emb_width,
        taps=head.spec.taps,
    )


def tapped_for(model: Any, heads: Iterable[ReadoutHead]) -> Backbone:
    """A ModelPatcher's backbone tapped where the heads read. Raises BackboneError if it can't be, or one doesn't fit."""
    backbone = backbone_of(model)
    read = {tap for head in heads for tap in check_fits(head, backbone).taps}
    return backbone.at(read) if read else backbone


def pictures_have_frames(model: Any) -> bool:
    """Whether a ModelPatcher's latents of pictures are (B, C, 1, h, w), as those of models that also make videos."""
    return getattr(model.model.latent_format, "latent_dimensions", 2) == 3


def input_scale(model: Any, sigma: Tensor, x: Tensor) -> Tensor:
    """z / x at this noise level, (B, 1, 1, 1), or with as many axes as x has: what the network's input is multiplied by."""
    ones = torch.ones_like(x.flatten(1)[:, :1]).view(-1, *[1] * (x.ndim - 1))
    return model.model_sampling.calculate_input(sigma.expand(x.shape[0]), ones)


def latent_out(model: Any, latent: Tensor) -> Tensor:
    """A BaseModel's latent in the VAE's scale, differentiable: a format's own tensors may be of inference mode."""
    scale = copy.copy(model.latent_format)
    vars(scale).update(plain(vars(scale)))
    return scale.process_out(latent)


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
