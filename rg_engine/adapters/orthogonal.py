"""Orthogonal matrices from skew ones (Qiu et al., arXiv 2306.07280, section 3.2), their strength and their angle.

Q is skew, Q^T = -Q, in blocks (..., b, b). Functions compute in the precision that they are given; :func:`exact` gives the
most that the device has, so that R R^T = I to the last digits of fp32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def skew(a: Tensor) -> Tensor:
    """A - A^T."""
    return a - a.mT


def exact(a: Tensor) -> Tensor:
    """``a`` in fp64, in fp32 on devices that have no fp64."""
    return a.to(torch.float32 if a.device.type == "mps" else torch.float64)


def cayley(q: Tensor) -> Tensor:
    """R = (I + Q)(I - Q)^-1 (the paper's section 3.2): orthogonal for every skew Q, without a turn by 180 degrees."""
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    return torch.linalg.solve(eye - q, eye + q)  # the factors commute


def inverse_cayley(r: Tensor) -> Tensor:
    """Q = (R - I)(R + I)^-1 of a rotation R that has no turn by 180 degrees; in fp64."""
    r = exact(r)
    eye = torch.eye(r.shape[-1], dtype=r.dtype, device=r.device)
    return skew(torch.linalg.solve(r + eye, r - eye)) / 2


def neumann(q: Tensor, coefficients: Sequence[float]) -> Tensor:
    """The polynomial sum_k c_k Q^k: near Cayley(Q) for small Q, orthogonal for none but 0."""
    power = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device).expand_as(q)
    total = coefficients[0] * power
    for coefficient in coefficients[1:]:
        power = power @ q
        total = total + coefficient * power
    return total


def neumann_coefficients(terms: int, *, last_doubled: bool) -> tuple[float, ...]:
    """I + 2Q + 2Q^2 + ... of so many terms; the last is Q^(terms - 1) alone unless ``last_doubled``, as in files of 2025.

    Two terms have no such last one, and three are as four.
    """
    if terms < 2:
        return (1.0,)
    if terms == 2 or last_doubled:
        return (1.0, *[2.0] * (terms - 1))
    return (1.0, *[2.0] * (max(terms, 4) - 2), 1.0)


def butterfly(blocks: Tensor, rows: Tensor) -> Tensor:
    """BOFT: ``rows`` (out, k) turned by stages of blocks (m, n, b, b), between which rows change places.

    In stage i the rows are regrouped (c 2 k) -> (c k 2) with k = 2^i b / 2, so that blocks mix rows far apart.
    """
    for i, stage in enumerate(blocks):
        n, b, _ = stage.shape
        half = 2**i * b // 2
        mixed = rows.unflatten(0, (-1, 2, half)).transpose(1, 2).reshape(n, b, -1)
        rows = (stage @ mixed).reshape(-1, half, 2, rows.shape[-1]).transpose(1, 2).reshape(rows.shape)
    return rows


def largest_angle(q: Tensor) -> float:
    """The largest angle by which Cayley(Q) turns anything, in degrees: 2 atan of Q's spectral norm."""
    return float(2 * torch.rad2deg(torch.atan(torch.tensor(spectral_norm(q)))))


def spectral_norm(q: Tensor) -> float:
    """The largest of the blocks', from the eigenvalues of Q^T Q, which takes a tenth of an SVD's time."""
    q = exact(q)
    return float(torch.linalg.eigvalsh(q.mT @ q).max().clamp_min(0).sqrt())


def orthogonality_error(r: Tensor) -> float:
    """max |R R^T - I|."""
    r = exact(r)
    return float((r @ r.mT - torch.eye(r.shape[-1], dtype=r.dtype, device=r.device)).abs().max())


def triangle(q: Tensor) -> Tensor:
    """The upper triangle of skew blocks (..., b, b), row by row, (..., b (b - 1) / 2)."""
    i, j = torch.triu_indices(q.shape[-1], q.shape[-1], 1)
    return q[..., i, j]


def from_triangle(v: Tensor, b: int) -> Tensor:
    """Skew blocks (..., b, b) with Q[i, j] = v for i < j."""
    i, j = torch.triu_indices(b, b, 1)
    upper = v.new_zeros(*v.shape[:-1], b, b)
    upper[..., i, j] = v
    return skew(upper)
