"""Identity: what is masked here should look like what is masked there, wherever it stands."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from .regions import weighted_mean


def identity_loss(
    readout: Tensor, reference: Tensor, *, reference_mask: Tensor, z_extent: Tensor, mask: Tensor | None = None
) -> Tensor:
    """The appearance loss of each place against the mean descriptor of the reference's region.

    Readout Guidance compares place with place (arXiv 2312.02150, sec. 3.3); its triplets, though, teach the descriptor to
    be the same for one identity wherever it stands, so a region of one picture can be held against another region.

    Args: readout, reference (B, D, H, W); reference_mask, mask (B, 1, H, W) in 0..1; z_extent (B,). Returns: (B,).
    """
    weights = reference_mask / reference_mask.flatten(1).sum(1).clamp_min(1e-6)[:, None, None, None]
    descriptor = (F.normalize(reference, dim=1) * weights).flatten(2).sum(2)[:, :, None, None]  # (B, D, 1, 1)
    distance = 1 - F.cosine_similarity(readout, descriptor, dim=1)  # (B, H, W)
    return weighted_mean(distance[:, None], mask) * z_extent.square()
