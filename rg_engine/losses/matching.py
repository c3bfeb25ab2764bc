"""Matching: what was at the start of a drag should be found at its end, and nowhere else.

It is what correspondence heads learn from (Readout Guidance, arXiv 2312.02150, sec. 3.1), asked of the picture in place of
the head. The paper's own guidance loss (:mod:`.correspondence`) compares two places alone: a picture that shows the thing
elsewhere, or twice, may do as well.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .correspondence import Window, cell_weights, gather, within

#: Divides similarities, as in training (there 0.07).
TEMPERATURE = 0.1


def matching_loss(readout: Tensor, source: Tensor, *, starts: Tensor, ends: Tensor, window: Window | None = None) -> Tensor:
    """Cross-entropy of finding a drag's start at its end, and its end at its start, by the logarithm of how many places
    there are.

    With u = source at start, v = readout at end, and p(a | u, maps) the softmax over places a of cos(u, maps at a) / T:

        (-1/2 mean log p(end | u, readout) - 1/2 mean log p(start | v, source)) / log(HW)

    It is 1 where any place is as good. A point between cells counts for its four neighbours. Anchors (drags without length)
    count beside other drags; alone they ask for nothing.

    Args:
        readout, source: (B, D, H, W).
        starts, ends: (N, 2) of (x, y), fractions of the picture.
        window: what part of the picture readout shows. A drag that ends outside of it should be found elsewhere, at a place
            that is as like it as can be; one that is outside of it altogether is left out.
    Returns: (B,).
    """
    u = gather(source, starts)  # (B, D, N)
    counts = (starts != ends).any().expand(len(starts))  # (N,)
    reached = torch.ones_like(counts)
    if window is not None:
        seen = within(starts, window)[1]
        ends, reached = within(ends, window)
        counts = counts & (seen | reached)
    forth = missed(u, readout, ends, TEMPERATURE, reached)
    back = torch.where(reached, missed(gather(readout, ends), source, starts, TEMPERATURE), 0.0)
    lost = (forth + back) / 2 / math.log(source.shape[-2] * source.shape[-1])
    return torch.where(counts, lost, 0.0).mean(1)


def missed(descriptors: Tensor, maps: Tensor, points: Tensor, temperature: float, reached: Tensor | None = None) -> Tensor:
    """-log p of finding descriptors (B, D, N) in maps (B, D, H, W) at points (N, 2), (B, N), by cosine similarities over
    temperature.

    reached (N,): where not, the point lies beyond the maps, at a place that is as like it as can be. None: all are.
    """
    places = F.normalize(maps, dim=1).flatten(2)
    similar = torch.einsum("bdn,bdp->bnp", F.normalize(descriptors, dim=1), places) / temperature
    here = (cell_weights(points, (maps.shape[-2], maps.shape[-1])).to(similar) * similar).sum(2)
    total = similar.logsumexp(2)
    found = total - here
    return found if reached is None else torch.where(reached, found, F.softplus(total - 1 / temperature))
