"""Pictures as losses take them: pixels in 0..1, crops of them (DOODL's cutouts), and what classifiers were normalised by."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

#: (size, x, y) of a square part, px.
Box = tuple[int, int, int]


def as_pixels(images: Tensor) -> Tensor:
    """(B, 3, H, W) in -1..1 to 0..1, in at least fp32. What is brighter than white, or darker than black, is cut off."""
    return (at_least_fp32(images) / 2 + 0.5).clamp(0, 1)


def at_least_fp32(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def normalised(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(B, 3, H, W) in 0..1 to what a network was trained on."""
    low, wide = (torch.tensor(values, dtype=pixels.dtype, device=pixels.device).view(3, 1, 1) for values in (mean, std))
    return (pixels - low) / wide


def averaged(pixels: Tensor, size_px: int) -> Tensor:
    """``adaptive_avg_pool2d`` to size_px squared, as matrix products, since Apple's GPUs pool to divisors only."""
    down, across = (_shares(side, size_px).to(pixels) for side in pixels.shape[-2:])
    return down @ pixels @ across.T


def _shares(side: int, parts: int) -> Tensor:
    """Which of ``side`` cells each of ``parts`` is the mean of, (parts, side)."""
    places, k = torch.arange(side), torch.arange(parts)
    first, end = k * side // parts, -(-(k + 1) * side // parts)
    inside = (places >= first[:, None]) & (places < end[:, None])
    return inside.double() / inside.sum(1, keepdim=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Crops:
    """What a network that takes square pictures of ``size_px`` is shown of larger ones.

    count 0: the whole picture, resized. Else so many random square crops, from ``smallest_px`` to the shorter side; at a
    small ``power`` most are large: size = smallest + r^power (shorter - smallest), r in 0..1 (the authors' cutouts).
    """

    count: int = 0
    power: float = 0.3
    size_px: int = 224
    smallest_px: int = 224

    def boxes(self, height: int, width: int, generator: torch.Generator) -> list[Box]:
        shorter = min(height, width)
        smallest = min(shorter, self.smallest_px)
        found = []
        for draw in torch.rand(self.count, 3, generator=generator).tolist():
            size = int(draw[0] ** self.power * (shorter - smallest) + smallest)
            found.append((size, int(draw[1] * (width - size + 1)), int(draw[2] * (height - size + 1))))
        return found

    def views(self, pixels: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
        """(B, 3, H, W) to what is shown, (B, 3, size, size) each. All pictures are cut alike."""
        if not self.count:
            yield F.interpolate(pixels, (self.size_px, self.size_px), mode="bilinear")
        for size, x, y in self.boxes(pixels.shape[-2], pixels.shape[-1], generator):
            yield averaged(pixels[..., y : y + size, x : x + size], self.size_px)


WHOLE = Crops()
