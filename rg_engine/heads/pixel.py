"""The Latent Guidance Predictor: many feature maps in, an encoded edge map out, each pixel by itself.

Sketch-Guided Diffusion (arXiv 2211.13752), sec. 3.1: the features, resized to the latent's size and concatenated with an
encoding of the noise level, go through an MLP a pixel. It reads this extension's own taps (the paper taps nine blocks).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .aggregation import resize

HIDDEN_WIDTHS = (512, 256, 128, 64)
FREQUENCIES = 9


class PixelNetwork(nn.Module):
    """A per-pixel MLP: in -> 512 -> 256 -> 128 -> 64 -> latent channels.

    Between layers: ReLU and a layer norm a pixel (the paper's batch norm would tie a picture to its batch).

    Args:
        feature_channels: channels of each tapped map, in order.
        output_channels: channels of the latent that it predicts.
        widths: of the hidden layers.
    """

    emb_width = 0

    def __init__(
        self, feature_channels: Sequence[int], *, output_channels: int, widths: Sequence[int] = HIDDEN_WIDTHS
    ) -> None:
        super().__init__()
        self.feature_channels = tuple(feature_channels)
        self.output_channels = output_channels
        # The first layer in slices, one a map: a 1x1 convolution commutes with the resize, so it runs at the map's own size.
        self.map_layers = nn.ModuleList(nn.Conv2d(channels, widths[0], 1, bias=False) for channels in feature_channels)
        self.noise_layer = nn.Linear(2 * FREQUENCIES, widths[0])
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in widths)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, (*widths[1:], output_channels), strict=True))

    def kept_channels(self, light: bool) -> int:
        """How many numbers of each latent cell of a picture are kept for backward, in the weights' precision."""
        return sum(2 * norm.normalized_shape[0] for norm in self.norms)  # type: ignore[union-attr, index, misc]

    def forward(self, features: Sequence[Tensor], noise_level: Tensor, size: tuple[int, int]) -> Tensor:
        """features (B, C_i, h_i, w_i) each, noise_level (B,) in 0..1, size (H, W) in latent cells -> (B, D, H, W)."""
        dtype = self.noise_layer.weight.dtype
        x = self.noise_layer(encode_noise_level(noise_level).to(dtype))[:, :, None, None]  # (B, 512, 1, 1)
        for layer, map_ in zip(self.map_layers, features, strict=True):
            x = x + resize(layer(map_.to(dtype)), size)
        x = x.permute(0, 2, 3, 1)  # (B, H, W, 512)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = layer(norm(F.relu(x)))
        return x.permute(0, 3, 1, 2)


def encode_noise_level(noise_level: Tensor) -> Tensor:
    """Sines and cosines of the noise level (B,) at octaves from half a turn on, (B, 2 * FREQUENCIES)."""
    octaves = math.pi * 2.0 ** torch.arange(FREQUENCIES, device=noise_level.device, dtype=torch.float32)
    angles = noise_level.float()[:, None] * octaves
    return torch.cat([angles.sin(), angles.cos()], 1)
