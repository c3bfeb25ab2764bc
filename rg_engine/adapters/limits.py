"""How far an adapter may turn: COFT's ball round the start (section 3.3 of the paper), LyCORIS' limit of a whole layer."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def coft_bound(eps: float, n: int, b: int) -> float:
    """The largest Frobenius norm of a block, eps b^2 / sqrt(n), as the authors' code has it; n is 1 for a shared block."""
    return eps * b * b / math.sqrt(n)


def project(blocks: Tensor, bound: float) -> Tensor:
    """Blocks (n, b, b), those whose Frobenius norm is above ``bound`` brought back to it."""
    norms = torch.linalg.matrix_norm(blocks, keepdim=True)
    return torch.where(norms > bound, blocks * (bound / norms), blocks)


def limit_layer(q: Tensor, bound: float) -> Tensor:
    """All blocks of a layer together brought to a Frobenius norm of ``bound`` at most."""
    norm = float(q.norm())
    return q * (bound / norm) if norm > bound else q
