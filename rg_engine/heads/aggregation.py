"""The aggregation network: many feature maps in, one map out.

Readout Guidance (arXiv 2312.02150), sec. 3.1, after Diffusion Hyperfeatures (2305.14334), eq. 1:
``readout = output(sum_l softmax(w)_l * B_l(features_l))``, B_l a bottleneck a layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

Activation = Literal["tanh", "none"]
NORM_GROUPS = 32  # of every GroupNorm in the authors' heads; tensors don't tell it
#: Bottlenecks run together up to so many numbers in all that they give: the launches of small ones take longer than their
#: work, but large ones together take memory, and on a CPU they no longer fit in its caches.
FEW, MANY = 2**19, 2**25
OUTPUT_WIDTHS = (128, 32)  # of the layers between the mixed map and the readout


class NormedConv(nn.Conv2d):
    """A convolution without bias whose GroupNorm lives inside it, as ``.norm`` (the authors' key layout).

    patch: it gives ``out_channels`` for each of the patch x patch cells of a token.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, patch: int = 1) -> None:
        super().__init__(in_channels, out_channels * patch**2, kernel_size, padding=kernel_size // 2, bias=False)
        self.norm = nn.GroupNorm(NORM_GROUPS, out_channels)
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.conv2d(x, self.weight, padding=self.padding))


class Bottleneck(nn.Module):
    """One layer's residual bottleneck, conditioned on the timestep embedding after its first convolution.

    patch: latent cells a side of each cell of its features, 2 for most transformers' tokens. What lies where in a token is
    in the token's channels, so it is unfolded as the transformer's own last layer does, by a sub-pixel convolution (arXiv
    1609.05158), where features of a UNet are resized.
    """

    def __init__(self, in_channels: int, out_channels: int, hidden: int, emb_width: int, patch: int = 1) -> None:
        super().__init__()
        self.patch = patch
        same = in_channels == out_channels and patch == 1
        self.shortcut = None if same else NormedConv(in_channels, out_channels, 1, patch)
        self.conv1 = NormedConv(in_channels, hidden, 1, patch)
        self.conv2 = NormedConv(hidden, hidden, 3)
        self.conv3 = NormedConv(hidden, out_channels, 1)
        self.emb_layers = nn.Linear(emb_width, hidden) if emb_width else None

    def forward(self, features: Tensor, emb: Tensor | None, size: tuple[int, int]) -> Tensor:
        """features (B, C, h, w), emb (B, E) or None -> (B, D, H, W)."""
        return side_by_side([self], [features], emb, size)

    @property
    def narrowing(self) -> list[NormedConv]:
        """The convolutions that see the features."""
        return [self.conv1] if self.shortcut is None else [self.conv1, self.shortcut]

    def narrow(self, features: Tensor, size: tuple[int, int]) -> Tensor:
        """features (B, C, h, w) through the convolutions that see them: (B, hidden, h, w), with the shortcut's D channels
        behind if there is one.

        The paper resizes the features first. A 1x1 convolution without bias commutes with a bilinear resize, whose
        weights sum to 1, so both convolutions run as one, at the features' own, smaller size.
        """
        weights = _joined([part.weight for part in self.narrowing], 0)
        return F.conv2d(features, weights) if self.patch == 1 else unfold(features, weights, self.patch, size)


def side_by_side(
    layers: Sequence[Bottleneck], features: Sequence[Tensor], emb: Tensor | None, size: tuple[int, int]
) -> Tensor:
    """n bottlenecks, all of them with a shortcut or none, each on its features (B, C_i, h_i, w_i), with emb (B, E) or None:
    (B, n D, H, W).

    What is alike in them runs once for all: their channels lie side by side, and a GroupNorm never looks beyond its group.
    """
    n, widths = len(layers), [part.norm.num_channels for part in layers[0].narrowing]
    maps = _resized([layer.narrow(map_, size) for layer, map_ in zip(layers, features, strict=True)], size)
    hidden, *shortcuts = zip(*(map_.split(widths, 1) for map_ in maps), strict=True)
    out = F.relu_(_norm([layer.conv1 for layer in layers], _joined(hidden)))  # (B, n hidden, H, W)
    embedders = [layer.emb_layers for layer in layers if layer.emb_layers is not None]
    if emb is not None and embedders:
        of_emb = F.linear(emb, *(_joined([getattr(each, name) for each in embedders], 0) for name in ("weight", "bias")))
        out = out + F.relu_(of_emb)[:, :, None, None]
    of_each = out.chunk(n, 1) if n > 1 else (out,)
    out = _joined([F.conv2d(map_, layer.conv2.weight, padding=1) for map_, layer in zip(of_each, layers, strict=True)])
    out = F.relu_(_norm([layer.conv2 for layer in layers], out))
    if n == 1:
        out = F.conv2d(out, layers[0].conv3.weight)
    else:
        weights = torch.stack([layer.conv3.weight.flatten(1) for layer in layers])  # (n, D, hidden)
        out = (weights @ out.unflatten(1, (n, -1)).flatten(3)).flatten(1, 2).unflatten(2, size)
    out = _norm([layer.conv3 for layer in layers], out)
    if not shortcuts:
        return F.relu_(out + _joined(_resized(features, size)))
    out += _norm([layer.shortcut for layer in layers if layer.shortcut is not None], _joined(shortcuts[0]))
    return F.relu_(out)


def _resized(maps: Sequence[Tensor], size: tuple[int, int]) -> list[Tensor]:
    """Maps (B, C_i, h_i, w_i) at another size, those of one size together."""
    found = list(maps)
    for shape in {map_.shape[-2:] for map_ in maps} - {torch.Size(size)}:
        places = [i for i, map_ in enumerate(maps) if map_.shape[-2:] == shape]
        resized = resize(_joined([maps[i] for i in places]), size)
        for i, map_ in zip(places, resized.split([maps[i].shape[1] for i in places], 1), strict=True):
            found[i] = map_
    return found


def _norm(convs: Sequence[NormedConv], maps: Tensor) -> Tensor:
    """Their GroupNorms, on what they gave side by side."""
    norms = [conv.norm for conv in convs]
    weight, bias = (_joined([getattr(norm, name) for norm in norms], 0) for name in ("weight", "bias"))
    return F.group_norm(maps, len(norms) * NORM_GROUPS, weight, bias, norms[0].eps)


def _joined(tensors: Sequence[Tensor], dim: int = 1) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tuple(tensors), dim)


class AggregationNetwork(nn.Module):
    """Reads a list of feature maps into one map at the latent's size.

    Args:
        feature_channels: channels of each tapped map, in order.
        projection_channels: channels of the mixed map (the authors' 384).
        emb_width: width of the timestep embedding; 0 for heads that take none.
        output_channels: channels of the output head; 0 for none (the mixed map is the readout).
        activation: after the output head.
        hidden: bottleneck width; a quarter of the projection unless told.
        patches: latent cells a side of each map's cells (see :class:`Bottleneck`); 1 unless told.
    """

    def __init__(
        self,
        feature_channels: Sequence[int],
        *,
        projection_channels: int = 384,
        emb_width: int = 1280,
        output_channels: int = 0,
        activation: Activation = "tanh",
        hidden: int | None = None,
        patches: Sequence[int] = (),
    ) -> None:
        super().__init__()
        hidden = hidden or projection_channels // 4
        self.feature_channels = tuple(feature_channels)
        self.projection_channels = projection_channels
        self.hidden_channels = hidden
        self.emb_width = emb_width
        self.output_channels = output_channels
        self.patches = tuple(patches) or (1,) * len(self.feature_channels)
        self.bottleneck_layers = nn.ModuleList(
            Bottleneck(channels, projection_channels, hidden, emb_width, patch)
            for channels, patch in zip(self.feature_channels, self.patches, strict=True)
        )
        self.mixing_weights = nn.Parameter(torch.ones(len(self.feature_channels)))
        self.output_head = _output_head(projection_channels, output_channels) if output_channels else None
        self.activation: Activation = activation

    def forward(
        self, features: Sequence[Tensor], emb: Tensor | None, size: tuple[int, int], *, light: bool = False
    ) -> Tensor:
        """features (B, C_i, h_i, w_i) each, emb (B, E) or None, size (H, W) in latent cells -> (B, D, H, W).

        light: bottlenecks keep nothing for backward but run again (checkpointing, arXiv 1604.06174).
        """
        weights = self.mixing_weights.softmax(0)
        dtype = self.mixing_weights.dtype
        emb = None if emb is None else emb.to(dtype)
        features = [map_.to(dtype) for map_ in features]
        mixed = weights.new_zeros(len(features[0]), self.projection_channels, *size)
        for places in self._turns(features[0], size, light):
            layers, maps = ([each[i] for i in places] for each in (self.bottleneck_layers, features))
            out = _run(side_by_side, light, layers, maps, emb, size)  # (B, n D, H, W)
            if len(places) == 1:
                mixed.addcmul_(weights[places[0]], out)
            else:
                mixed += torch.einsum("n,bndhw->bdhw", weights[places], out.unflatten(1, (len(places), -1)))
        if self.output_head is None:
            return mixed
        readout = self.output_head(mixed)
        return readout.tanh() if self.activation == "tanh" else readout

    def _turns(self, like: Tensor, size: tuple[int, int], light: bool) -> list[list[int]]:
        """Which bottlenecks run together."""
        numbers = len(like) * len(self.feature_channels) * self.projection_channels * size[0] * size[1]
        if light or numbers > (FEW if like.device.type == "cpu" else MANY):
            return [[i] for i in range(len(self.feature_channels))]
        kinds: dict[bool, list[int]] = {}
        for i, layer in enumerate(self.bottleneck_layers):
            kinds.setdefault(layer.shortcut is None, []).append(i)  # type: ignore[union-attr]
        return list(kinds.values())

    def kept_channels(self, light: bool) -> int:
        """How many numbers of each latent cell of a picture are kept for backward, in the weights' precision."""
        layer = 5 * self.hidden_channels + 3 * self.projection_channels
        output = self.projection_channels + 2 * sum(OUTPUT_WIDTHS) if self.output_head is not None else 0
        return layer * (1 if light else len(self.bottleneck_layers)) + output


def _output_head(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, OUTPUT_WIDTHS[0], 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(*OUTPUT_WIDTHS, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(OUTPUT_WIDTHS[1], out_channels, 1),
    )


def _run(layer: Callable[..., Tensor], light: bool, *inputs: Any) -> Tensor:
    return checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False) if light else layer(*inputs)


def unfold(features: Tensor, weights: Tensor, patch: int, size: tuple[int, int]) -> Tensor:
    """Tokens (B, C, h, w) to cells (B, D, patch h, patch w) by weights (D patch^2, C, 1, 1), cut where the last ones reach
    beyond ``size``. Features that come at that size are tokens that the tap has repeated."""
    if features.shape[-2:] == size:
        features = features[..., ::patch, ::patch]
    cells = F.pixel_shuffle(F.conv2d(features, weights), patch)
    beyond = (have - want for have, want in zip(cells.shape[-2:], size, strict=True))
    return cells[..., : size[0], : size[1]] if all(0 <= each < patch for each in beyond) else cells


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """x (B, C, h, w) at another size, bilinear (align_corners=False), as a product with one matrix a side.

    That is a third of F.interpolate's time with its backward, whose sums on CUDA also differ from run to run.
    """
    if x.shape[-2:] == size:
        return x
    down, across = (interpolation(n, m, x.device, x.dtype) for n, m in zip(x.shape[-2:], size, strict=True))
    return down @ (x @ across.T)  # (H, h) @ ((B, C, h, w) @ (w, W))


@functools.lru_cache(maxsize=64)
def interpolation(count: int, wanted: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(wanted, count): linear interpolation of ``count`` samples to ``wanted``."""
    with torch.inference_mode(False), torch.no_grad():
        matrix = F.interpolate(torch.eye(count, dtype=torch.float64)[None], size=wanted, mode="linear")[0].T
        return matrix.to(device, dtype).contiguous()
