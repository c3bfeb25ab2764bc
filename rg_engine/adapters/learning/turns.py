"""What learns: the upper triangles of skew Q, from 0, in blocks that turn the inputs of frozen layers (equation 6 of
OFT)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..adapter import Layer
from ..limits import coft_bound, project
from ..orthogonal import cayley, from_triangle, triangle
from ..rotation import Rotation


class Turns(nn.Module):
    """Rotations of layers, side in. Of R's two places of a number the triangle has one: its gradient is twice theirs, which
    AdamW does not see, and |R|_F is sqrt(2) times the triangle's norm."""

    def __init__(self, blocks: Mapping[str, tuple[int, int]], coft_eps: float = 0.0) -> None:
        """blocks: by layer, how many (n) of which size (b). coft_eps: of COFT in the authors' meaning; 0 is plain OFT."""
        super().__init__()
        self.blocks, self.coft_eps = dict(blocks), coft_eps
        self.triangles = nn.ParameterList([nn.Parameter(torch.zeros(n, b * (b - 1) // 2)) for n, b in blocks.values()])

    def skews(self) -> dict[str, Tensor]:
        """Q (n, b, b) by layer."""
        pairs = zip(self.blocks.items(), self.triangles, strict=True)
        return {key: from_triangle(v, b) for (key, (_, b)), v in pairs}

    def in_force(self) -> dict[str, Tensor]:
        """R = Cayley(Q) by layer, differentiable."""
        return {key: cayley(q) for key, q in self.skews().items()}

    @torch.no_grad()
    def project(self) -> None:
        """COFT: every block back into its ball. Done after each step, so that what is saved is what was used."""
        if not self.coft_eps:
            return
        for (_, q), v in zip(self.skews().items(), self.triangles, strict=True):
            v.copy_(triangle(project(q, coft_bound(self.coft_eps, *q.shape[:2]))))

    @torch.no_grad()
    def layers(self) -> tuple[Layer, ...]:
        return tuple(Layer(key=key, rotation=Rotation(q=q.detach().clone(), side="in")) for key, q in self.skews().items())


def turned_input(x: Tensor, rotation: Tensor, channels_first: bool = False) -> Tensor:
    """x (..., in), or (B, in, ...), turned so that a frozen layer W gives what W blockdiag(R)^T would: x blockdiag(R)."""
    moved = x.movedim(1, -1) if channels_first else x
    parts = moved.to(rotation.dtype).unflatten(-1, rotation.shape[:2])
    turned = torch.einsum("...nb,nbc->...nc", parts, rotation).flatten(-2).to(x.dtype)
    return turned.movedim(-1, 1) if channels_first else turned
