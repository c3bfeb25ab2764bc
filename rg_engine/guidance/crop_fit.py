"""Places a crop on one axis of a picture, from the profile of :mod:`.crop_marks`' mask along it.

A profile is the mask's mean over the other axis. Over a crop it is code(start + size u) plus a constant, u in 0..1: start
and size follow by nonlinear least squares, from a grid of places.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import torch
from torch import Tensor
from torch.nn import functional as F

LINEAR, RIPPLE, WAVES = 0.25, 0.3, 2
SMALLEST = 1 / 24  # crops whose size can be told, as a part of the picture's
MIN_PX = 8
BINS = 48  # of a profile, for the search
#: Largest RMS misfit of a profile, in units of code and as a part of its own standard deviation; all for 8-bit values.
MISFIT, MISFIT_SHARE = 0.01, 0.12
CLOSE = 0.0014  # misfit below which nobody looks for padding
FLAT = 0.0013  # standard deviation of a profile that says nothing


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
class Fits:
    """Ways to read one axis: start, size, RMS misfit inside and mean of code over the crop, (K,) each.

    pad: px at either end that are none of the picture's; error: squared misfit of all px, these too.
    """

    start: Tensor
    size: Tensor
    misfit: Tensor
    mean: Tensor
    error: Tensor
    pad: int


def fits_of(profile: Tensor) -> Fits | None:
    """The ways to read a profile (n,), in units of code plus any constant; None if it is none."""
    if profile.std() < FLAT:
        return None
    found = _fit(profile, 0)
    if found is not None and found.misfit.min() < CLOSE:
        return found
    padded = _padded(profile)
    if found is None or (padded is not None and padded.error.min() < found.error.min() / 2):
        return padded
    return found


def _padded(profile: Tensor) -> Fits | None:
    """The best reading of a profile that repeats the border's values at either end."""
    pad, best = _padding(profile), None
    for reach, step in ((9, 3), (2, 1)) if pad else ():
        pads = range(max(1, pad - reach), min(pad + reach, (len(profile) - MIN_PX) // 2) + 1, step)
        tried = [fits for fits in (_fit(profile, pad) for pad in pads) if fits is not None]
        best = min(tried, key=lambda fits: float(fits.error.min()), default=None)
        if best is None:
            break
        pad = best.pad
    return best


def _fit(profile: Tensor, pad: int) -> Fits | None:
    """Least squares from the best place of each eighth of the picture (Gauss-Newton on centre and size)."""
    core = profile[pad : len(profile) - pad]
    n = len(core)
    rim = max(1, n // 40)  # resizing bends the outermost px
    u, wanted = _places(n)[rim : n - rim], core[rim : n - rim]
    centres, sizes = _grid()
    errors = _errors(*_binned(u, wanted))  # (K,)
    eighth = (centres * 8).long().clamp(0, 7)
    best = torch.stack([errors.masked_fill(eighth != k, math.inf).argmin() for k in range(8)])
    centre, size = (values[best].repeat(3)[:, None] for values in (centres, sizes))  # (24, 1)
    blur = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64).repeat_interleave(8)[:, None]  # see _sharpness
    for _ in range(12):
        t, sharpness = centre + size * u, _sharpness(size / n, blur)
        steep = slope(t, sharpness)
        by = torch.stack([steep, steep * u, torch.ones_like(steep)], -1)  # (24, n, 3)
        step = torch.linalg.lstsq(by, (wanted - code(t, sharpness))[..., None]).solution[..., 0].clamp(-0.04, 0.04)
        size = (size + step[:, 1:2]).clamp(SMALLEST * 0.8, 1.02)
        centre = (centre + step[:, :1]).clamp(0, 1)
    whole = code(centre + size * _places(n), _sharpness(size / n, blur))
    guess = whole[:, rim : n - rim]
    left = wanted - guess
    offset = left.mean(1, keepdim=True)
    misfit = (left - offset).square().mean(1).sqrt()
    error = (profile - offset - F.pad(whole[:, None], (pad, pad), mode="replicate")[:, 0]).square().sum(1)
    start, size = (centre - size / 2)[:, 0], size[:, 0]
    good = (misfit < MISFIT) & (misfit < MISFIT_SHARE * guess.std(1)) & (size >= SMALLEST * 0.9)
    good &= (start > -0.02) & (start + size < 1.02)
    if not good.any():
        return None
    return Fits(
        start=start[good], size=size[good], misfit=misfit[good], mean=whole.mean(1)[good], error=error[good], pad=pad
    )


def _sharpness(px: Tensor, blur: Tensor) -> Tensor:
    """What is left of the ripple when px of so much of the picture are sampled (blur 0), averaged (1), or averaged over two
    neighbours (2)."""
    return torch.sinc(WAVES * px) ** blur


def _padding(profile: Tensor) -> int:
    """Of about how many px at either end the border's values were repeated: where that explains the profile best."""
    n = len(profile)
    pads = range(1, (n - MIN_PX) // 2 + 1)[:: max(1, n // 128)]
    errors = []
    for pad in pads:
        core = profile[pad : n - pad]
        inside = _errors(*_binned(_places(len(core)), core)).min() * len(core) / min(len(core), BINS)
        ends = (profile[:pad] - core[0]).square().sum() + (profile[n - pad :] - core[-1]).square().sum()
        errors.append(float(inside + ends))
    return pads[errors.index(min(errors))] if errors else 0


def _places(n: int) -> Tensor:
    """The centres of n px along a crop, (n,) in -0.5..0.5."""
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n - 0.5


def _binned(u: Tensor, profile: Tensor) -> tuple[Tensor, Tensor]:
    """Places and a profile, (n,) each, averaged to BINS at most."""
    if len(u) <= BINS:
        return u, profile
    return tuple(F.adaptive_avg_pool1d(values[None], BINS)[0] for values in (u, profile))  # type: ignore[return-value]


def _errors(u: Tensor, profile: Tensor) -> Tensor:
    """Squared misfit of a profile (n,) at places u (n,) with each place of the grid, (K,)."""
    centres, sizes = _grid()
    left = profile - code(centres[:, None] + sizes[:, None] * u)
    return (left - left.mean(1, keepdim=True)).square().sum(1)


@functools.cache
def _grid() -> tuple[Tensor, Tensor]:
    """Centres and sizes, (K,) each, close enough for Gauss-Newton to find the best between them."""
    found = []
    for size in torch.logspace(math.log10(SMALLEST), 0, 56, dtype=torch.float64).tolist():
        centres = torch.linspace(size / 2, 1 - size / 2, math.ceil((1 - size) / size * 12) + 1, dtype=torch.float64)
        found.append(torch.stack([centres, torch.full_like(centres, size)]))
    return tuple(torch.cat(found, 1))  # type: ignore[return-value]
