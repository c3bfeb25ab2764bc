"""What heads learn from: functions of a batch of readouts that give one number an example.

A mean over examples is then the same number however the batch is split over microbatches and processes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..losses.correspondence import gather
from ..losses.matching import missed


def balanced_mse(readout: Tensor, control: Tensor, *, background: float | None = None, tolerance: float = 1e-3) -> Tensor:
    """Mean squared error; in sparse controls the background's and the foreground's means count alike.

    As the authors' training does for pose and edges, where most of a control is background (readout_training,
    ``sparse_loss``), here for each picture. Args: readout, control (N, D, H, W); background, the control's empty value, or
    None for dense ones. Returns: (N,).
    """
    error = (readout.float() - control).square().flatten(1)
    if background is None:
        return error.mean(1)
    empty = ((control - background).abs() <= tolerance).flatten(1)
    sums = [(error * part).sum(1) / part.sum(1).clamp_min(1) for part in (empty, ~empty)]
    both = empty.any(1) & (~empty).any(1)
    return torch.where(both, (sums[0] + sums[1]) / 2, error.mean(1))


def track_contrast(readouts: Tensor, tracks: Tensor, temperature: float) -> Tensor:
    """Symmetric contrastive loss: among all places of the other picture, a point is most like its own.

    Readout Guidance (arXiv 2312.02150), sec. 3.1: cross-entropy over cosine similarities, in both directions. A point
    between cells counts for its four neighbours by its distance to them.

    Args:
        readouts: (N, 2, D, H, W).
        tracks: (N, P, 2, 2), [point, picture, (x, y)] as fractions; rows of NaN are padding.
        temperature: divides the similarities.
    Returns: (N,); 0 for an example without a point.
    """
    losses = []
    for maps, points in zip(readouts.float(), tracks, strict=True):
        points = points[~points.isnan().flatten(1).any(1)]  # (P, 2, 2)
        if not len(points):
            losses.append(maps.sum() * 0)
            continue
        directions = []
        for here, there in ((0, 1), (1, 0)):
            descriptors = gather(maps[here : here + 1], points[:, here])  # (1, D, P)
            directions.append(missed(descriptors, maps[there : there + 1], points[:, there], temperature).mean())
        losses.append((directions[0] + directions[1]) / 2)
    return torch.stack(losses)


def triplet_hinge(readouts: Tensor, margin: float) -> Tensor:
    """The same identity elsewhere should be nearer than another identity, by a margin.

    Readout Guidance (arXiv 2312.02150), sec. 3.1: max(0, margin + d(anchor, same) - d(anchor, other)), d the mean over
    places of 1 - cos. Args: readouts (N, 3, D, H, W), anchor, same, other. Returns: (N,).
    """
    anchor, same, other = readouts.float().unbind(1)
    nearer, farther = (1 - F.cosine_similarity(anchor, maps, dim=1).flatten(1).mean(1) for maps in (same, other))
    return F.relu(margin + nearer - farther)


def region_hinge(readouts: Tensor, regions: Tensor, margin: float) -> Tensor:
    """The same, told where the identity is: each place of the anchor's region should be nearer to the mean descriptor of
    the same one's region than to that of the other's, by a margin.

    It teaches what :func:`rg_engine.losses.identity_loss` asks for. Args: readouts (N, 3, D, H, W); regions (N, 3, H, W) in
    0..1. Returns: (N,); 0 for an example with an empty region.
    """
    maps = F.normalize(readouts.float(), dim=2)
    totals = regions.flatten(2).sum(2)  # (N, 3)
    means = (maps * regions[:, :, None]).flatten(3).sum(3) / totals.clamp_min(1e-6)[:, :, None]  # (N, 3, D)
    distance = 1 - F.cosine_similarity(maps[:, :1], means[:, 1:, :, None, None], dim=2)  # (N, 2, H, W)
    nearer, farther = ((distance * regions[:, :1]).flatten(2).sum(2) / totals[:, :1].clamp_min(1e-6)).unbind(1)
    return F.relu(margin + nearer - farther) * (totals > 0).all(1)
