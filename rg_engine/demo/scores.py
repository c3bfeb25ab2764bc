"""Scores of readouts and pictures: percentages of correct points, ranks, overlaps. Nothing here knows a head."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..losses.correspondence import gather
from .measure import EDGE_THRESHOLD
from .render import edge_map

PCK_AT = (0.05, 0.1, 0.2)


def peaks(heatmaps: Tensor) -> Tensor:
    """Where each heat map (N, J, H, W) is highest, to a part of a cell, (N, J, 2) of (x, y) as fractions."""
    n, joints, height, width = heatmaps.shape
    best = heatmaps.flatten(2).argmax(-1)  # (N, J)
    rows, columns = best // width, best % width
    ys, xs = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    near = ((ys - rows[..., None, None]).abs() <= 1) & ((xs - columns[..., None, None]).abs() <= 1)  # (N, J, H, W)
    weight = heatmaps.clamp_min(0) * near + 1e-9 * near
    total = weight.flatten(2).sum(-1)
    x = ((weight * (xs + 0.5)).flatten(2).sum(-1) / total) / width
    y = ((weight * (ys + 0.5)).flatten(2).sum(-1) / total) / height
    return torch.stack([x, y], -1).view(n, joints, 2)


def pck(found: Tensor, true: Tensor, extent: Tensor | float, at: Sequence[float] = PCK_AT) -> dict[str, float]:
    """The share of points (N, P, 2) nearer to their true place than ``at`` times ``extent`` (N,); NaN rows don't count."""
    error = (found - true).norm(dim=-1)  # (N, P)
    scale = torch.as_tensor(extent, dtype=error.dtype).expand(len(error))[:, None]
    counts = ~error.isnan()
    return {f"{alpha:g}": float((error <= alpha * scale)[counts].float().mean()) for alpha in at}


def figure_extent(joints: Tensor) -> Tensor:
    """The longer side of the box around joints (N, J, 2), (N,)."""
    return (joints.amax(1) - joints.amin(1)).amax(-1)


def nearest_places(source: Tensor, other: Tensor, points: Tensor, finer: int = 4) -> Tensor:
    """Where in ``other`` (N, D, H, W) is most like ``source`` at ``points`` (N, P, 2): the same, by cosine, as fractions."""
    found = []
    height, width = other.shape[-2] * finer, other.shape[-1] * finer
    for here, there, wanted in zip(source, other, points, strict=True):
        descriptors = F.normalize(gather(here[None], wanted.nan_to_num())[0], dim=0)  # (D, P)
        fine = F.normalize(F.interpolate(there[None], (height, width), mode="bilinear")[0], dim=0).flatten(1)
        best = (descriptors.T @ fine).argmax(1)
        found.append(torch.stack([(best % width + 0.5) / width, (best // width + 0.5) / height], -1))
    return torch.stack(found)


def auc(positive: Tensor, negative: Tensor) -> float:
    """The chance that a positive's score is above a negative's (area under the ROC curve)."""
    above = (positive[:, None] > negative[None]).float() + 0.5 * (positive[:, None] == negative[None]).float()
    return float(above.mean())


def sketch_iou(picture: np.ndarray, sketch: np.ndarray) -> float:
    """Overlap of a picture's edges with a sketch's, both thresholded and thickened by a pixel: intersection over union.

    Args: picture (H, W, 3); sketch (H, W), edge strength in 0..1.
    """
    a, b = (_thick(edges > EDGE_THRESHOLD) for edges in (edge_map(picture), sketch))
    return float((a & b).sum() / max((a | b).sum(), 1))


def _thick(mask: np.ndarray) -> np.ndarray:
    p = np.pad(mask, 1)
    return p[1:-1, 1:-1] | p[:-2, 1:-1] | p[2:, 1:-1] | p[1:-1, :-2] | p[1:-1, 2:]
