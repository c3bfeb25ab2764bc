"""A mask that says which part of a picture a crop of it shows.

Detailers and tiled upscalers cut a picture into crops and sample each in a run of its own. What they hand to the sampler says
nothing of where the crop lies, but they cut the masks of its prompts in the same way. A prompt's mask has no effect on the
prediction if no other prompt has one: ComfyUI divides the weighted sum of the prompts' predictions by the sum of the weights.
So a mask can carry coordinates: with t in 0..1 along each side,

    mask = 1/8 + 7/16 (code(x) + code(y))

``code`` is a parabola, which survives any resizing (an even kernel adds a constant to it), with a ripple of two waves, whose
phase and frequency tell place and size of small crops from 8-bit values. A crop's column means are code(start + size u) plus
a constant, u in 0..1 over the crop: start and size follow by least squares, and the constant of both axes together tells
the waves apart.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import TargetError
from ..types import Region

#: A prompt's key that says that its mask is ``coordinate_mask``.
MARK = "readout_guidance_crop"

BASE, SPAN = 1 / 8, 7 / 16
LINEAR, RIPPLE, WAVES = 0.25, 0.3, 2
SMALLEST = 1 / 24  # crops whose size can be told, as a part of the picture's
MIN_PX = 8
BINS = 48  # of a profile, for the search
#: Largest RMS misfit of a profile, in units of code and as a part of its own standard deviation, and of the mask's means.
MISFIT, MISFIT_SHARE, MISFIT_MEAN = 0.006, 0.12, 0.012
BLACK = 1 / 16
SNAP = 0.003  # an edge so near to the picture's is on it


def coordinate_mask(size_px: tuple[int, int] = (1024, 1024)) -> Tensor:
    """The mask that :func:`read_crop` reads, (1, H, W) in 1/8..1; size_px: its height and width."""
    y, x = (code((torch.arange(n, dtype=torch.float64) + 0.5) / n) for n in size_px)
    return (BASE + SPAN * (y[:, None] + x[None, :]))[None].float()


def code(t: Tensor, sharpness: Tensor | float = 1.0) -> Tensor:
    """The mask's profile along one side, about 0..1, at t in 0..1; sharpness: of the ripple, 1 if nothing blurred it."""
    parabola = LINEAR * t + (1 - LINEAR) * t.square()
    return ((1 - RIPPLE) * parabola + RIPPLE / 2 * (1 - sharpness * torch.cos(2 * math.pi * WAVES * t))) / _LARGEST


def slope(t: Tensor, sharpness: Tensor | float = 1.0) -> Tensor:
    """The derivative of :func:`code`."""
    parabola = LINEAR + 2 * (1 - LINEAR) * t
    return ((1 - RIPPLE) * parabola + RIPPLE * math.pi * WAVES * sharpness * torch.sin(2 * math.pi * WAVES * t)) / _LARGEST


_LARGEST = 1.0
_LARGEST = float(code(torch.linspace(0, 1, 1001, dtype=torch.float64)).max())


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Fits:
    """Ways to read one axis: start, size, RMS misfit and mean of code over the crop, (K,) each; pad at each end, in px."""

    start: Tensor
    size: Tensor
    misfit: Tensor
    mean: Tensor
    pad: int


def read_crop(mask: Tensor) -> Region | None:
    """Which part of the picture a crop of :func:`coordinate_mask` shows; None if the mask is no such crop.

    mask: (B, H, W) or (H, W) of 8 px or more a side, resized or not, in 0..1, of which the first is read. What lies beyond the
    picture's border, black or filled with the border's values on two sides alike, is no part of the region.
    """
    picture = (mask if mask.ndim == 2 else mask[0]).detach().to("cpu", torch.float64)
    picture = _inside(picture)
    if min(picture.shape) < MIN_PX or not torch.isfinite(picture).all() or picture.min() < BLACK or picture.max() > 1.05:
        return None
    across, down = (_fits(picture.mean(axis) / SPAN) for axis in (0, 1))
    if across is None or down is None:
        return None
    core = picture[down.pad : picture.shape[0] - down.pad, across.pad : picture.shape[1] - across.pad]
    mean = (core.mean() - BASE) / SPAN
    apart = core - core.mean(0, keepdim=True) - core.mean(1, keepdim=True) + core.mean()
    if apart.square().mean().sqrt() > MISFIT:
        return None
    wrong = (across.mean[:, None] + down.mean[None, :] - mean).abs() > MISFIT_MEAN / SPAN
    total = (across.misfit[:, None] + down.misfit[None, :]).masked_fill(wrong, math.inf)
    i, j = divmod(int(total.argmin()), total.shape[1])
    if not torch.isfinite(total[i, j]):
        return None
    x, width = _edges(float(across.start[i]), float(across.size[i]))
    y, height = _edges(float(down.start[j]), float(down.size[j]))
    return Region(x=x, y=y, width=width, height=height)


def crop_of(conds: Sequence[Mapping[str, Any]]) -> Region | None:
    """The part of the picture that marked prompts show; None if none is marked.

    conds: prompts as ComfyUI's guiders hold them, before sampling; the first marked one counts.
    Raises TargetError if the mask of that one can't be read.
    """
    marked = next((cond for cond in conds if cond.get(MARK)), None)
    if marked is None:
        return None
    mask = marked.get("mask")
    region = read_crop(mask) if isinstance(mask, Tensor) and mask.ndim in (2, 3) and mask.numel() else None
    if region is None:
        what = f"its mask, {tuple(mask.shape)}," if isinstance(mask, Tensor) else "it"
        raise TargetError(
            f"a prompt went through Follow Crops, but {what} no longer says which part of the picture is sampled: another "
            "node replaced or changed it, or the crop is smaller than a twentieth of the picture. Put Follow Crops last, "
            "right before the detailer or upscaler, or remove it"
        )
    return region


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


def _fits(profile: Tensor) -> _Fits | None:
    """The ways to read a profile (n,), in units of code plus any constant; None if it is none."""
    if profile.std() * SPAN < 1 / 255:
        return None
    found = _fit(profile, 0)
    if found is None:
        pad = _padding(profile)
        found = _fit(profile[pad : len(profile) - pad], pad) if pad else None
    return found


def _fit(profile: Tensor, pad: int) -> _Fits | None:
    """Least squares from the best place of each eighth of the picture (Gauss-Newton on centre and size)."""
    n = len(profile)
    errors = _errors(_binned(profile)[None])[0]  # (K,)
    starts, sizes = _GRID
    eighth = ((starts + sizes / 2) * 8).long().clamp(0, 7)
    best = torch.stack([errors.masked_fill(eighth != k, math.inf).argmin() for k in range(8)])
    size = sizes[best].repeat(2)[:, None]  # (16, 1)
    centre = starts[best].repeat(2)[:, None] + size / 2
    averaged = torch.tensor([0.0, 1.0], dtype=torch.float64).repeat_interleave(8)[:, None]  # or sampled, where px are large
    rim = max(1, n // 40)  # resizing bends the outermost px
    u = ((torch.arange(n, dtype=torch.float64) + 0.5) / n - 0.5)[None, rim : n - rim]
    wanted = profile[None, rim : n - rim]
    for _ in range(12):
        t, sharpness = centre + size * u, torch.sinc(WAVES * size / n * averaged)
        steep = slope(t, sharpness)
        by = torch.stack([steep, steep * u, torch.ones_like(steep)], -1)  # (16, n, 3)
        step = torch.linalg.lstsq(by, (wanted - code(t, sharpness))[..., None]).solution[..., 0].clamp(-0.04, 0.04)
        size = (size + step[:, 1:2]).clamp(SMALLEST * 0.8, 1.02)
        centre = (centre + step[:, :1]).clamp(0, 1)
    sharpness = torch.sinc(WAVES * size / n * averaged)
    guess = code(centre + size * u, sharpness)
    left = wanted - guess
    misfit = (left - left.mean(1, keepdim=True)).square().mean(1).sqrt()
    start = (centre - size / 2)[:, 0]
    size = size[:, 0]
    good = (misfit * SPAN < MISFIT) & (misfit < MISFIT_SHARE * guess.std(1)) & (size >= SMALLEST * 0.9)
    good &= (start > -0.02) & (start + size < 1.02)
    if not good.any():
        return None
    return _Fits(start=start[good], size=size[good], misfit=misfit[good], mean=guess.mean(1)[good], pad=pad)


def _padding(profile: Tensor) -> int:
    """Of how many px at either end the border's values were repeated: where that explains the profile best."""
    n = len(profile)
    pads = torch.arange(1, (n - MIN_PX) // 2 + 1)
    if not len(pads):
        return 0
    pads = pads[:: max(1, len(pads) // 128)]
    cores = torch.stack([_binned(profile[pad : n - pad]) for pad in pads.tolist()])  # (P, BINS)
    inside = _errors(cores).amin(1) / BINS * (n - 2 * pads)
    flat = torch.stack(
        [
            (profile[:pad] - profile[pad]).square().sum() + (profile[n - pad :] - profile[n - pad - 1]).square().sum()
            for pad in pads.tolist()
        ]
    )
    return int(pads[(inside + flat).argmin()])


def _binned(profile: Tensor) -> Tensor:
    """A profile at BINS evenly spaced places, (BINS,), without its mean."""
    mode = "area" if len(profile) >= BINS else "linear"
    out = torch.nn.functional.interpolate(profile[None, None], BINS, mode=mode)[0, 0]
    return out - out.mean()


def _errors(profiles: Tensor) -> Tensor:
    """Squared misfit of binned profiles (P, BINS) with each place of the grid, (P, K)."""
    return (_CODES.square().sum(1)[None] - 2 * profiles @ _CODES.T + profiles.square().sum(1)[:, None]).clamp_min(0)


def _grid() -> tuple[Tensor, Tensor]:
    """Starts and sizes, (K,) each, close enough for Gauss-Newton to find the best between them."""
    rows = []
    for size in torch.logspace(math.log10(SMALLEST), 0, 56, dtype=torch.float64).tolist():
        count = math.ceil((1 - size) / (size / 12)) + 1
        rows.append(torch.stack([torch.linspace(0, 1 - size, count, dtype=torch.float64), torch.full((count,), size)], -1))
    starts, sizes = torch.cat(rows).unbind(-1)
    return starts, sizes


_GRID = _grid()
_CODES = code(_GRID[0][:, None] + _GRID[1][:, None] * ((torch.arange(BINS, dtype=torch.float64) + 0.5) / BINS))
_CODES -= _CODES.mean(1, keepdim=True)
