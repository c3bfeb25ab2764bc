"""One layer's adapter: which rotation it is, at which strength, and what it makes of a weight.

Every layout's numbers come here in one convention: R = Cayley(Q) acts from the left, on the side

in      of a neuron's inputs, W' = W blockdiag(R)^T: keeps the angles between neurons, the paper's energy
out     of the neurons, W' = blockdiag(R) W: keeps the angles between columns
memory  of the authors' convolutions: ``out`` on the weight's memory read as (in kh kw, out); keeps no energy
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import torch
from torch import Tensor

from ..errors import AdapterError
from .orthogonal import butterfly, cayley, exact, neumann

Side = Literal["in", "out", "memory"]
LARGEST_Q = 100.0


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Rotation:
    """q: skew, fp32, (n, b, b), with all limits applied; (m, n, b, b) are the stages of a butterfly (BOFT).

    shared: one block, n = 1, for all. series: the coefficients of the polynomial in Q that the file means in Cayley's
    place, at strength 1. magnitudes: (out, 1), what the neurons are multiplied by, after the turn. rows: (first, count) of a
    fused weight that it is for; None for all. convolutions_back: W' = W blockdiag(R) where the weight is a convolution's.
    """

    q: Tensor
    side: Side
    shared: bool = False
    series: tuple[float, ...] = ()
    magnitudes: Tensor | None = None
    rows: tuple[int, int] | None = None
    convolutions_back: bool = False

    @property
    def is_butterfly(self) -> bool:
        return self.q.ndim == 4

    @property
    def block_size(self) -> int:
        return self.q.shape[-1]

    @property
    def width(self) -> int:
        """The width that its blocks fill, without a shared one's repetitions."""
        return self.q.shape[-3] * self.block_size

    def check(self, name: str) -> None:
        """Raises AdapterError for numbers that no training leaves behind."""
        for what, values in (("Q", self.q), ("its magnitudes", self.magnitudes)):
            if values is not None and not torch.isfinite(values).all():
                raise AdapterError(f"{name}: {what} holds NaN or infinite values: the training it comes from broke down")
        if self.q.numel() and float(self.q.abs().max()) > LARGEST_Q:
            raise AdapterError(
                f"{name}: |Q| is {float(self.q.abs().max()):.3g}, more than {LARGEST_Q:g}, where every turn is nearly one "
                "by 180 degrees: the file is damaged, or means something else"
            )
        stages, n, b = (self.q.shape[0] if self.is_butterfly else 0), self.q.shape[-3], self.block_size
        if stages and (b % 2 or (n * b) % (2 ** (stages - 1) * b)):
            raise AdapterError(
                f"{name}: {stages} butterfly stages of {n} blocks of {b}: b must be even, and 2^(m-1) divide n"
            )

    def fitted(self, shape: tuple[int, ...], name: str) -> Rotation:
        """The rotation for a weight of this shape. Raises AdapterError if it does not fit."""
        if len(shape) < 2:
            raise AdapterError(f"{name}: the weight has the shape {shape}, and only matrices and convolutions can be turned")
        fan_in = math.prod(shape[1:])
        wanted = {"in": fan_in, "out": shape[0], "memory": fan_in}[self.side]
        fits = wanted % self.block_size == 0 if self.shared else self.width == wanted
        if not fits:
            where = "outputs" if self.side == "out" else "inputs"
            n = self.q.shape[-3]
            raise AdapterError(
                f"{name}: {'a shared block' if self.shared else f'{n} blocks'} of {self.block_size} for {wanted} {where} "
                f"(the weight is {' x '.join(map(str, shape))}): trained on another kind of model (SD1.5 has a context of "
                "768, SDXL of 2048)"
            )
        if self.magnitudes is not None and self.magnitudes.numel() != shape[0]:
            raise AdapterError(f"{name}: {self.magnitudes.numel()} magnitudes for {shape[0]} outputs")
        if self.convolutions_back and len(shape) > 2:
            return dataclasses.replace(self, q=-self.q, convolutions_back=False)
        return self

    def blocks(self, strength: float = 1.0) -> Tensor:
        """R at a strength, fp32, in the shape of ``q``.

        At 1 what the file means; else Cayley(strength Q), orthogonal at every strength, that of -1 the way back. Not the
        geodesic: an angle a becomes 2 atan(strength tan(a / 2)).
        """
        q = exact(self.q)
        r = neumann(q, self.series) if self.series and strength == 1.0 else cayley(strength * q)
        return r.float()

    def scales(self, strength: float = 1.0) -> Tensor | None:
        """The magnitudes at a strength, (out, 1): 1 + strength (m - 1)."""
        return None if self.magnitudes is None else 1 + strength * (self.magnitudes.view(-1, 1) - 1)

    def turn(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        """W' in fp32, for a weight that it fits (the whole one: ``rows`` are the caller's)."""
        return turn(weight, self.blocks(strength).to(weight.device), self.side, self.scales(strength))


def turn(weight: Tensor, blocks: Tensor, side: Side, scales: Tensor | None = None) -> Tensor:
    """W' in fp32: ``weight`` (out, in, ...) turned by blocks (n, b, b), a shared one (1, b, b), or stages (m, n, b, b)."""
    w = weight.float()
    rows = {"in": w.flatten(1).mT, "out": w.flatten(1), "memory": w.reshape(-1, w.shape[0])}[side]
    if blocks.ndim == 4:
        turned = butterfly(blocks, rows)
    else:
        turned = (blocks @ rows.unflatten(0, (-1, blocks.shape[-1]))).flatten(0, 1)
    turned = (turned.mT if side == "in" else turned).reshape(w.shape)
    return turned if scales is None else turned * scales.to(w).view(-1, *[1] * (w.ndim - 1))
