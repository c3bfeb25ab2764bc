"""How a picture would be rated: a small head on CLIP's picture features. Its public files, told by their keys.

* linear: ``weight`` (1, D), ``bias`` (1): ``sa_0_4_vit_l_14_linear.pth``
* five layers without activations: ``layers.0/2/4/6/7``: ``sac+logos+ava1-l14-linearMSE.pth``
* five layers with ReLU between them: ``layers.0/3/6/9/11``: ``ava+logos-l14-reluMSE.pth``
"""

from __future__ import annotations

import dataclasses
import itertools

import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import OptimizationError
from ..pixels import WHOLE, Crops, as_pixels, at_least_fp32
from .clip import Embed

LOWEST, HIGHEST = 1.0, 10.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class AestheticHead:
    """layers: weight (out, in) and bias (out,) of each."""

    name: str
    layers: tuple[tuple[Tensor, Tensor], ...]
    relu: bool = False

    @property
    def width(self) -> int:
        return self.layers[0][0].shape[1]

    def __call__(self, features: Tensor) -> Tensor:
        """Features (n, D) to a score each, (n,), about 1 to 10."""
        x = F.normalize(at_least_fp32(features), dim=-1)
        for i, (weight, bias) in enumerate(self.layers):
            x = F.linear(F.relu(x) if self.relu and i else x, weight.to(x), bias.to(x))
        return x[:, 0]


def aesthetic_head(tensors: dict[str, Tensor], name: str) -> AestheticHead:
    """A head of a file's tensors. Raises OptimizationError for any other file."""
    numbers = sorted({int(parts[1]) for key in tensors if (parts := key.split("."))[0] == "layers" and parts[1].isdigit()})
    prefixes = [""] if set(tensors) == {"weight", "bias"} else [f"layers.{number}." for number in numbers]
    try:
        layers = tuple((tensors[prefix + "weight"].float(), tensors[prefix + "bias"].float()) for prefix in prefixes)
        fits = bool(layers) and layers[-1][0].shape[0] == 1
        fits &= all(a[0].shape[0] == b[0].shape[1] for a, b in itertools.pairwise(layers))
    except (KeyError, IndexError):
        fits = False
    if not fits or len(tensors) != 2 * len(prefixes):
        raise OptimizationError(
            f"{name!r} is no aesthetic head that is known here: it holds {', '.join(sorted(tensors)[:4])}; one has weight "
            "and bias, or layers.0 to layers.7 or layers.11 that end in one score"
        )
    return AestheticHead(name=name, layers=layers, relu=numbers[1:2] == [3])


@dataclasses.dataclass(frozen=True, kw_only=True)
class AestheticLoss:
    """target: the score to come to; 0 is as high as it goes. clamped: cut scores off at 1 and 10 as the authors do, where
    the gradient then ends."""

    embed: Embed
    head: AestheticHead
    target: float = 0.0
    crops: Crops = WHOLE
    clamped: bool = False

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """(B,): the mean over crops of the distance to the target, or of the score with a minus."""
        scores = [self.head(self.embed(view)) for view in self.crops.views(as_pixels(images), generator)]
        found = torch.stack([score.clamp(LOWEST, HIGHEST) if self.clamped else score for score in scores])
        return (found - self.target).abs().mean(0) if self.target else -found.mean(0)
