"""How a transformer's stream becomes a map: the picture's tokens are picked and put in rows. A UNet's outputs are maps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import BackboneError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokens:
    """Where the picture's tokens are in a block's output (B, L, C); they run row by row in every family.

    item: which of a block's outputs (None: it gives one tensor). patch: latent cells a token's side. place: whether they
    begin the stream or end it (text first). multiple: a stream that ends in them is padded to such a multiple of tokens.
    counted: a module that sees what shows pictures, alone: references too, if the stream has any. It tells how far from the
    stream's end they begin, or, where they begin it, that there are none beside the picture. exact: whether the stream holds
    nothing else.
    """

    item: int | None = None
    patch: int = 2
    place: Literal["start", "end"] = "start"
    multiple: int = 1
    counted: str | None = None
    exact: bool = False

    def read(self, output: Any, latent: tuple[int, ...], lengths: Mapping[str, int]) -> Tensor:
        """The map (B, C, h, w) of a picture, from the shape of the network's input, (B, C, H, W) or (B, C, 1, H, W).

        Where the patches don't divide H and W, its cells are repeated, (B, C, H, W).

        Tokens are normalised (a layer norm without weights, fp32): in a few fixed channels their values are a hundred times
        as large as elsewhere (arXiv 2505.18584), and pass fp16's range. What is given is a tensor of its own: blocks
        write into each other's. Raises BackboneError for a video, and for a stream of another length.
        """
        tokens: Tensor = output if self.item is None or isinstance(output, Tensor) else output[self.item]
        frames = latent[2] if len(latent) == 5 else 1
        if frames > 1:
            raise BackboneError(f"the latent is a video of {frames} frames, and one picture can be read out: use one frame")
        height, width = (math.ceil(side / self.patch) for side in latent[-2:])
        count = height * width
        if tokens.ndim == 5:  # (B, 1, h, w, C)
            tokens = tokens.flatten(1, 3)
        shown = lengths.get(self.counted or "", math.ceil(count / self.multiple) * self.multiple)
        length, first = tokens.shape[1], 0 if self.place == "start" else tokens.shape[1] - shown
        if (self.exact and length != count) or (self.place == "start" and shown > count and self.counted):
            raise BackboneError(
                f"the model's stream has {length} tokens where the picture has {count}: what another picture that it was "
                "given adds can't be told from it. Give it none for the guided sampler"
            )
        tokens = tokens[:, first : first + count]  # (B, h * w, C)
        if first < 0 or tokens.shape[1] != count:
            raise BackboneError(
                f"the model's stream has {length} tokens where the picture has {count}: another node changes it. Bypass "
                "that node for the guided sampler"
            )
        map_ = _Normalised.apply(tokens).unflatten(1, (height, width)).movedim(-1, 1)
        if latent[-2] % self.patch == 0 and latent[-1] % self.patch == 0:
            return map_
        # The last tokens reach beyond the latent's edge.
        cells = map_.repeat_interleave(self.patch, -2).repeat_interleave(self.patch, -1)
        return cells[..., : latent[-2], : latent[-1]]


class _Normalised(torch.autograd.Function):
    """Tokens (B, N, C) with mean 0 and deviation 1 each, in fp32 or more; kept for backward are the tokens as they came."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        return _normalise(tokens)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (tokens,) = ctx.saved_tensors
        with torch.enable_grad():
            leaf = tokens.detach().requires_grad_()
            return torch.autograd.grad(_normalise(leaf), leaf, gradient)[0]


def _normalise(tokens: Tensor) -> Tensor:
    exact = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    return F.layer_norm(exact, exact.shape[-1:])
