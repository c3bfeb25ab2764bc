"""LoRA (Hu et al., arXiv 2106.09685) in the loop of OFT: what adapters are compared with, not a trainer for users."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...adapters import Layer
from ...comfy_host.adapters.training.turning import TurnedModel


class LowRank(nn.Module):
    """W + B A for each layer: A (rank, in) random, B (out, rank) from 0."""

    def __init__(self, shapes: Mapping[str, tuple[int, int]], rank: int, seed: int) -> None:
        """shapes: (out, in) by layer."""
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.keys = tuple(shapes)
        self.down = nn.ParameterList([torch.randn(rank, i, generator=generator) / i**0.5 for _, i in shapes.values()])
        self.up = nn.ParameterList([torch.zeros(o, rank) for o, _ in shapes.values()])

    def in_force(self) -> dict[str, tuple[Tensor, Tensor]]:
        return {key: (a, b) for key, a, b in zip(self.keys, self.down, self.up, strict=True)}

    def project(self) -> None:
        """LoRA has no ball."""

    def layers(self) -> tuple[Layer, ...]:
        return ()


class LowRankModel(TurnedModel):
    """Linear layers with what LoRA adds to their outputs."""

    def _attach(self, key: str, layer: nn.Module) -> Any:
        def add(_module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor | None:
            pair = self._in_force.get(key)
            return None if pair is None else out + F.linear(F.linear(args[0], pair[0]), pair[1]).to(out.dtype)

        return layer.register_forward_hook(add)
