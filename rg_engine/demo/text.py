"""The demo model's text encoder: a vocabulary of the world's own words and a small transformer."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from .world import COLOURS, SOLIDS, WALLS

WORDS = ("<pad>", "a", "and", ",", "wall", "figure", *SOLIDS, *COLOURS, *WALLS)
MAX_TOKENS = 16
WIDTH = 96


def tokenize(text: str) -> tuple[list[int], list[str]]:
    """Token ids of the words known (in order, at most MAX_TOKENS) and the words that aren't."""
    words = re.findall(r"[a-z]+|,", text.lower())
    known = [WORDS.index(word) for word in words if word in WORDS]
    return known[:MAX_TOKENS], [word for word in words if word not in WORDS]


class TextEncoder(nn.Module):
    """Token ids (B, 16), 0 is padding, to embeddings (B, 16, 96). A caption left out is all padding."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(len(WORDS), WIDTH)
        self.places = nn.Parameter(torch.randn(MAX_TOKENS, WIDTH) * 0.1)
        layer = nn.TransformerEncoderLayer(
            WIDTH, nhead=4, dim_feedforward=2 * WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.norm(self.layers(self.words(tokens) + self.places))


def pad(tokens: list[int]) -> list[int]:
    return tokens + [0] * (MAX_TOKENS - len(tokens))


def as_tokens(captions: list[str]) -> Tensor:
    """Token ids of captions, (B, 16)."""
    return torch.tensor([pad(tokenize(caption)[0]) for caption in captions])
