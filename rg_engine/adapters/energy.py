"""Hyperspherical energy (Liu et al., arXiv 1805.09298; equation 1 of OFT), which one turn of all neurons leaves as it is."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .orthogonal import exact

ROWS_AT_ONCE = 1024
AUTHORS_MARGIN = 1e-4


def hyperspherical_energy(weight: Tensor, side: Literal["rows", "columns"] = "rows", half_space: bool = False) -> float:
    """The mean of 1 / |w_i - w_j| over pairs of a weight's neurons brought to length 1 (``columns``: of its inputs).

    weight: (out, in, ...), flattened. The paper's energy is the sum over all pairs; the mean can be compared between layers.
    half_space: each neuron counts with its opposite, and cosines are kept from 1, both as in the authors' code.
    """
    w = exact(weight.flatten(1))
    w = w if side == "rows" else w.mT
    w = torch.cat([w, -w]) if half_space else w
    norms, count, total = w.norm(dim=1), len(w), 0.0
    for first in range(0, count, ROWS_AT_ONCE):
        part = slice(first, first + ROWS_AT_ONCE)
        cosines = w[part] @ w.mT / (norms[part, None] * norms + (AUTHORS_MARGIN if half_space else 1e-30))
        squared = (2 - 2 * cosines).clamp_min(1e-12)
        squared[torch.arange(len(squared)), torch.arange(first, first + len(squared))] = torch.inf  # itself
        total += float(squared.rsqrt().sum())
    return total / max(count * (count - 1), 1)
