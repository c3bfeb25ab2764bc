"""A mask that says which part of a picture a crop of it shows.

Detailers and tiled upscalers cut a picture into crops and sample each in a run of its own. What they hand to the sampler
says nothing of where the crop lies, but they cut the masks of its prompts in the same way. A mask that all of them share and
that is nowhere black has no effect on the prediction: ComfyUI divides the weighted sum of the prompts' predictions by the
sum of the weights. So a mask can carry coordinates: with x and y in 0..1 over the picture,

    mask = 1/8 + 7/16 (code(x) + code(y))

``code`` is a parabola, which survives any resizing (an even kernel adds a constant to it), with a ripple of two waves, whose
phase and frequency tell place and size of small crops from 8-bit values. A crop's column means are code(start + size u) plus
a constant, u in 0..1 over the crop: start and size follow by least squares, and the constant of both axes together tells
the waves apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import TargetError
from ..types import Region
from .crop_fit import MIN_PX, code, fits_of

#: A prompt's key that says that its mask is ``coordinate_mask``.
MARK = "readout_guidance_crop"

BASE, SPAN = 1 / 8, 7 / 16
#: Largest misfit of the mask: RMS of what is no sum of a row and a column, and of its mean.
MISFIT, MISFIT_MEAN = 0.004, 0.006
#: Another place of which an edge is so much of the picture away must misfit (squared) so many times as much.
APART, DOUBT = 0.05, 2.0
BLACK = 1 / 16
FEWEST_PX, MOST_PX = 1024, 2048  # of the mask's longer side
SNAP = 0.0015  # an edge so near to the picture's is on it


def coordinate_mask(size_px: tuple[int, int] = (1024, 1024)) -> Tensor:
    """The mask that :func:`read_crop` reads, (1, H, W) in 1/8..1; size_px: its height and width."""
    y, x = (code((torch.arange(n, dtype=torch.float64) + 0.5) / n) for n in size_px)
    return (BASE + SPAN * (y[:, None] + x[None, :]))[None].float()


def read_crop(mask: Tensor) -> Region | None:
    """Which part of the picture a crop of :func:`coordinate_mask` shows; None if the mask is no such crop.

    mask: (B, H, W) or (H, W) of 8 px or more a side, resized or not, in 0..1, of which the first is read. What lies beyond
    the picture's border, black or filled with the border's values on two sides alike, is no part of the region.
    Crops of an eighth of the picture and more are found within 0.2% of it (median 0.02%) from 8-bit values at 128 px and
    more, within 1% at 8 px; of smaller ones, one in eight can't be told from another place and gives None.
    """
    picture = (mask if mask.ndim == 2 else mask[0]).detach().to("cpu", torch.float64)
    picture = _inside(picture) if picture.numel() else picture
    if min(picture.shape) < MIN_PX or not torch.isfinite(picture).all() or picture.min() < BLACK or picture.max() > 1.05:
        return None
    across, down = (fits_of(picture.mean(axis) / SPAN) for axis in (0, 1))
    if across is None or down is None:
        return None
    core = picture[down.pad : picture.shape[0] - down.pad, across.pad : picture.shape[1] - across.pad]
    mean = (core.mean() - BASE) / SPAN
    apart = core - core.mean(0, keepdim=True) - core.mean(1, keepdim=True) + core.mean()
    if apart.square().mean().sqrt() > MISFIT:
        return None
    wrong = (across.mean[:, None] + down.mean - mean).abs() > MISFIT_MEAN / SPAN
    total = (across.misfit.square()[:, None] + down.misfit.square()).masked_fill(wrong, math.inf)
    i, j = divmod(int(total.argmin()), total.shape[1])
    others = ((across.start - across.start[i]).abs() > APART)[:, None] | ((down.start - down.start[j]).abs() > APART)
    grain = (0.3 / 255 / SPAN) ** 2 / min(core.shape)  # of the means of 8-bit values
    if not torch.isfinite(total[i, j]) or bool((others & (total < DOUBT * total[i, j] + grain)).any()):
        return None
    x, width = _edges(float(across.start[i]), float(across.size[i]))
    y, height = _edges(float(down.start[j]), float(down.size[j]))
    return Region(x=x, y=y, width=width, height=height)


def mark(conditioning: Sequence[Sequence[Any]], size_px: tuple[int, int]) -> list[list[Any]]:
    """Prompts, as ComfyUI's nodes pass them ([embedding, options] each), with the mask and the mark in their options.

    size_px: height and width of the picture that will be cropped. The mask has its aspect, since Impact's detailers scale
    left and right by the heights' ratio and top and bottom by the widths': any other mask is cropped elsewhere.
    Raises TargetError if one has a mask or an area of its own: the mask would not be the only one any more.
    """
    for number, (_, options) in enumerate(conditioning, 1):
        own = "an area" if "area" in options else "a mask" if "mask" in options and not options.get(MARK) else ""
        if own:
            raise TargetError(
                f"prompt {number} of {len(conditioning)} has {own} of its own, and Follow Crops needs the prompt's mask to "
                f"mark crops: remove the node that sets {own} (Conditioning (Set {'Area' if own == 'an area' else 'Mask'}))"
            )
    marks = {"mask": coordinate_mask(_mask_size(size_px)), "mask_strength": 1.0, "set_area_to_bounds": False, MARK: True}
    return [[embedding, {**options, **marks}] for embedding, options in conditioning]


def crop_of(conds: Sequence[Mapping[str, Any]]) -> Region | None:
    """The part of the picture that marked prompts show; None if none is marked.

    conds: prompts as ComfyUI's guiders hold them, before sampling; the first marked one counts.
    Raises TargetError if the mask of that one can't be read, or if others are not marked: they would outweigh it.
    """
    marked = next((cond for cond in conds if cond.get(MARK)), None)
    if marked is None:
        return None
    if not all(cond.get(MARK) for cond in conds):
        raise TargetError(
            "some of the prompts went through Follow Crops and others did not: combine them first, and put Follow Crops last"
        )
    mask = marked.get("mask")
    region = read_crop(mask) if isinstance(mask, Tensor) and mask.ndim in (2, 3) and mask.numel() else None
    if region is None:
        what = f"its mask, {tuple(mask.shape)}," if isinstance(mask, Tensor) else "it"
        raise TargetError(
            f"a prompt went through Follow Crops, but {what} no longer says which part of the picture is sampled: another "
            "node replaced or changed it, or the crop is smaller than a tenth of the picture. Put Follow Crops last, "
            "right before the detailer or upscaler, or remove it"
        )
    return region


def _mask_size(size_px: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the mask for a picture: a whole multiple of its own, so that crops begin and end on its px, unless
    it is too large for that."""
    longest = max(size_px)
    scale = MOST_PX / longest if longest > MOST_PX else math.ceil(FEWEST_PX / longest)
    height, width = (max(1, round(px * scale)) for px in size_px)
    return height, width


def _inside(picture: Tensor) -> Tensor:
    """Without black rows and columns around it."""
    rows, columns = ((picture.amax(axis) >= BLACK).nonzero()[:, 0] for axis in (1, 0))
    if not len(rows) or not len(columns):
        return picture[:0]
    return picture[int(rows[0]) : int(rows[-1]) + 1, int(columns[0]) : int(columns[-1]) + 1]


def _edges(start: float, size: float) -> tuple[float, float]:
    """Start and size inside 0..1, on the picture's border if nearly so."""
    end = 1.0 if start + size > 1 - SNAP else start + size
    start = 0.0 if start < SNAP else start
    return start, end - start
