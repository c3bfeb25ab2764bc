"""Trains the demo world's picture-text pair: pictures beside their captions, and beside captions that differ in one word.

The contrastive loss of CLIP (arXiv 2103.00020). A caption may be that of several pictures of a batch; half of a batch are
scenes of as many things, whose captions are near one another, and each caption brings altered ones that no picture has to
have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..demo.autoencoder import Autoencoder
from ..demo.wording import variants
from ..optimization.pixels import CLIP_MEAN, CLIP_STD, normalised
from .demo_parts import load_shards, loop_settings, train_part

#: Altered captions that come with each; the share of pictures that are rebuilt from noisy latents, as sampled ones are.
ALTERED, REBUILT = 2, 0.1
SHIFT_PX = 3
SHARPEST = 100.0  # of the softmax, as CLIP's


def scaled_cosines(pair: Any, values: Tensor, tokens: Tensor) -> Tensor:
    """Of pictures (B, 3, s, s), normalised, and captions (T, L), (B, T)."""
    pictures, texts = (F.normalize(f.float(), dim=-1) for f in (pair.pictures(values), pair.texts(tokens)))
    return pair.logit_scale.exp().clamp(max=SHARPEST) * pictures @ texts.T


def contrastive_loss(cosines: Tensor, own: Tensor) -> Tensor:
    """Of scaled cosines (B, T) and each picture's caption, own (B,) in 0..T-1: which caption of all, and which pictures of
    those that there are; a caption's pictures count as one."""
    there = own.unique()
    found = cosines[:, there]
    right = torch.where(own[:, None] == there, found, -torch.inf).logsumexp(0)
    return (F.cross_entropy(cosines, own) - (right - found.logsumexp(0)).mean()) / 2


def train_clip(
    pair: nn.Module, tokens_of: Callable[[str], list[int]], data: Path, out: Path, decoder: Autoencoder, steps: int,
    batch: int = 96, device: str = "cpu",
) -> None:  # fmt: skip
    """Train ``pair``, with ``pictures`` and ``texts`` to features and a ``logit_scale``, on the pictures and latents in
    ``data``; save it in ``out``."""
    pictures = torch.from_numpy(np.concatenate([_halved(shard) for shard in load_shards(data, "images")]))
    latents = torch.from_numpy(np.concatenate(list(load_shards(data, "latents", "latents"))))
    captions = np.concatenate(list(load_shards(data, "captions")))
    things = np.char.count(captions, "a ")
    alike = [np.flatnonzero(things == count) for count in np.unique(things)]
    rebuilt = round(REBUILT * batch)
    known: dict[str, list[int]] = {}

    def draw(step: int) -> Iterator[tuple[Tensor, ...]]:
        rng = np.random.default_rng([24, step])
        near = alike[rng.integers(len(alike))]
        pick = np.concatenate([rng.choice(near, batch - batch // 2), rng.integers(len(captions), size=batch // 2)])
        rng.shuffle(pick)
        own = [str(caption) for caption in captions[pick]]
        altered = [_altered(caption, rng) for caption in own for _ in range(ALTERED)]
        words = list(dict.fromkeys([*own, *altered]))
        for caption in words:
            if caption not in known:
                known[caption] = tokens_of(caption)
        number = {caption: i for i, caption in enumerate(words)}
        generator = torch.Generator().manual_seed(step)
        noise = torch.randn(rebuilt, *latents.shape[1:], generator=generator)
        noisy = latents[pick[:rebuilt]].float() + 0.4 * torch.rand(rebuilt, 1, 1, 1, generator=generator) * noise
        seen = _varied(pictures[pick[rebuilt:]], generator)
        texts = torch.tensor([known[caption] for caption in words])
        yield tuple(t.to(device) for t in (noisy, seen, texts, torch.tensor([number[caption] for caption in own])))

    def compute_loss(noisy: Tensor, seen: Tensor, texts: Tensor, own: Tensor) -> Tensor:
        with torch.no_grad():
            again = F.avg_pool2d(decoder.decode(noisy).float().clamp(-1, 1) / 2 + 0.5, 2)
        return contrastive_loss(scaled_cosines(pair, normalised(torch.cat([again, seen]), CLIP_MEAN, CLIP_STD), texts), own)

    train_part(pair, draw, compute_loss, out, loop_settings(steps, 1.5e-3), batch, device)


def _altered(caption: str, rng: np.random.Generator) -> str:
    """Another caption, an attribute apart."""
    choices = list(variants(caption).values())
    others = choices[rng.integers(len(choices))]
    return others[rng.integers(len(others))]


def _varied(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures (n, s, s, 3) in bytes, a little moved, lighter or darker, and noisy, (n, 3, s, s) in about 0..1."""
    pixels = pictures.permute(0, 3, 1, 2).float() / 255
    x, y = torch.randint(0, 2 * SHIFT_PX + 1, (2,), generator=generator).tolist()
    padded = F.pad(pixels, (SHIFT_PX,) * 4, mode="replicate")
    pixels = padded[..., y : y + pixels.shape[-2], x : x + pixels.shape[-1]]
    light, spread = torch.rand(2, len(pixels), 1, 1, 1, generator=generator)
    return pixels * (0.93 + 0.14 * light) + 0.06 * spread * torch.randn(pixels.shape, generator=generator)


def _halved(pictures: np.ndarray) -> np.ndarray:
    """(n, 2 s, 2 s, 3) bytes to (n, s, s, 3)."""
    n, height, width, _ = pictures.shape
    cells = pictures.reshape(n, height // 2, 2, width // 2, 2, 3).sum((2, 4), dtype=np.uint16)
    return ((cells + 2) // 4).astype(np.uint8)
