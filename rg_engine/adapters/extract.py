"""The rotation that best takes one model's layer to another's (orthogonal Procrustes, Schonemann 1966), block by block."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .orthogonal import exact, inverse_cayley
from .rotation import LARGEST_Q, Rotation

#: How much of the identity decides where the weights leave a direction open.
NEAREST = 1e-9


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Extracted:
    """changed: |W1 - W0|^2; left: |W1 - W0 blockdiag(R)^T|^2, what no rotation explains; flipped: blocks that were nearest
    to a reflection; still: blocks left as they are, since they turn by 180 degrees, which Cayley's form does not hold."""

    rotation: Rotation
    changed: float
    left: float
    flipped: int
    still: int


def extract(before: Tensor, after: Tensor, n: int, b: int) -> Extracted:
    """From weights (out, in, ...) of one shape, side in, n blocks of b: R_i = U V^T of the SVD of W1_i^T W0_i."""
    w0, w1 = exact(before.flatten(1)), exact(after.flatten(1))
    pairs = (w.unflatten(1, (n, b)).transpose(0, 1) for w in (w1, w0))  # (n, out, b)
    parts1, parts0 = pairs
    overlap = parts1.mT @ parts0
    scale = torch.linalg.matrix_norm(overlap, 2)[:, None, None]
    u, _, vh = torch.linalg.svd(overlap + NEAREST * scale * torch.eye(b, dtype=overlap.dtype, device=overlap.device))
    reflected = torch.linalg.det(u @ vh) < 0
    u[reflected, :, -1] *= -1  # the smallest singular value's
    q = _skew_of(u @ vh)
    still = ~torch.isfinite(q).flatten(1).all(1) | (q.abs().flatten(1).amax(1) > LARGEST_Q)
    q[still] = 0
    rotation = Rotation(q=q.float(), side="in")
    left = exact(rotation.turn(before)).flatten(1) - w1
    return Extracted(
        rotation=rotation, changed=float((w1 - w0).square().sum()), left=float(left.square().sum()),
        flipped=int(reflected.sum()), still=int(still.sum()),
    )  # fmt: skip


def _skew_of(r: Tensor) -> Tensor:
    """Block by block, NaN where R + I can't be inverted."""
    found = []
    for block in r:
        try:
            found.append(inverse_cayley(block))
        except RuntimeError:  # singular
            found.append(torch.full_like(block, torch.nan))
    return torch.stack(found)
