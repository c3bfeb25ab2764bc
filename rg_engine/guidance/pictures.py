"""Readouts as pictures, and pictures as images."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import TargetError
from ..heads import HeadSpec

if TYPE_CHECKING:
    from PIL import Image


def readout_picture(readout: Tensor, spec: HeadSpec, size_px: tuple[int, int]) -> Tensor:
    """A readout (B, D, H, W) as pictures (B, h, w, 3) in 0..1 of ``size_px`` (height, width).

    A spatial readout is shown in its control's range; heat maps are tinted by joint and overlaid; anything else by its
    three main directions (PCA over the batch), so that like features have like colours.
    """
    readout = readout.float()
    low, high = spec.control_range
    if spec.kind == "spatial":
        picture = (readout - low) / (high - low)
        picture = picture.expand(-1, 3, -1, -1) if picture.shape[1] == 1 else _three(picture)
    elif spec.kind == "keypoint":
        hues = torch.arange(readout.shape[1], device=readout.device) / readout.shape[1] * 6
        offsets = torch.tensor([0.0, 4.0, 2.0], device=readout.device)
        tints = ((hues[:, None] + offsets) % 6 - 3).abs().sub(1).clamp(0, 1)  # (D, 3)
        picture = torch.einsum("bdhw,dc->bchw", ((readout - low) / (high - low)).clamp(0, 1), tints)
    else:
        picture = _three(principal_directions(readout))
    picture = F.interpolate(picture, size_px, mode="bilinear").clamp(0, 1)
    return picture.permute(0, 2, 3, 1).contiguous()


def without_frames(latents: Tensor) -> Tensor:
    """Latents (B, C, h, w) of pictures, of models that also make videos (B, C, 1, h, w). Raises TargetError for a video."""
    if latents.ndim != 5:
        return latents
    if latents.shape[2] != 1:
        raise TargetError(
            f"the latent is a video of {latents.shape[2]} frames, and one picture can be read out: give one frame"
        )
    return latents[:, :, 0]


def spread(values: Tensor, like: Tensor) -> Tensor:
    """Values (B,), or masks (B, 1, H, W), with the axes of latents (B, C, H, W) or (B, C, 1, H, W)."""
    missing = like.ndim - values.ndim
    if values.ndim == 4 and missing:
        return values[:, :, None]
    return values.view(-1, *[1] * (like.ndim - 1)) if values.ndim == 1 else values


def as_image(picture: Tensor) -> Image.Image:
    """A picture (h, w, 3) in 0..1, clamped, as Pillow has it."""
    from PIL import Image

    return Image.fromarray((picture.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy())


def principal_directions(maps: Tensor) -> Tensor:
    """The three main directions of (B, D, H, W), each scaled to 0..1: (B, 3, H, W)."""
    batch, _, height, width = maps.shape
    rows = maps.permute(0, 2, 3, 1).flatten(0, 2).cpu()  # (B*H*W, D)
    rows = rows - rows.mean(0)
    _, _, directions = torch.linalg.svd(rows, full_matrices=False)
    signs = torch.where(directions[:3].sum(1, keepdim=True) < 0, -1.0, 1.0)  # SVD leaves the sign open
    shares = rows @ (directions[:3] * signs).T  # (B*H*W, <=3)
    shares = (shares - shares.amin(0)) / (shares.amax(0) - shares.amin(0)).clamp_min(1e-6)
    return shares.view(batch, height, width, -1).permute(0, 3, 1, 2).to(maps.device)


def _three(picture: Tensor) -> Tensor:
    """Exactly three channels: further ones are left out, missing ones are black."""
    return F.pad(picture[:, :3], (0, 0, 0, 0, 0, max(0, 3 - picture.shape[1])))
