"""The shared words.

x         the sampler's latent, (B, C, H, W)
sigma     its noise level
denoised  the model's prediction of the clean latent
z         the latent at the network's input scale: x / sqrt(1 + sigma^2) for eps and v models, x for flow models
features  the tapped maps of the network, a list of (B, C_i, H_i, W_i)
emb       the timestep embedding, (B, E)
noise_level  the noise's share of z, (B,) in 0..1: sigma / sqrt(1 + sigma^2) for eps and v models, sigma for flow models
readout   what a head makes of the features, (B, D, H, W)
control   what a spatial readout is compared with, (B, D, H, W)
source    the picture that a drag or an appearance target starts from
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, get_args

from .errors import TargetError

HeadKind = Literal["spatial", "appearance", "correspondence", "keypoint", "lgp"]
HEAD_KINDS: tuple[HeadKind, ...] = get_args(HeadKind)

Mode = Literal["fast", "reference", "norm_ratio"]
MODES: tuple[Mode, ...] = get_args(Mode)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DragPoints:
    """Drags drawn on a picture of an aspect (width / height; None: whatever is made), played in so many frames."""

    drags: tuple[Drag, ...]
    frames: int = 1
    aspect: float | None = None


@dataclasses.dataclass(frozen=True)
class Drag:
    """Move what is at ``start`` to ``end``; both (x, y), fractions 0..1 of the picture, x to the right, y down."""

    start: tuple[float, float]
    end: tuple[float, float]

    def __post_init__(self) -> None:
        for x, y in (self.start, self.end):
            if not (math.isfinite(x) and math.isfinite(y) and 0.0 <= x <= 1.0 and 0.0 <= y <= 1.0):
                raise TargetError(
                    f"drag point ({x:g}, {y:g}) lies outside the picture: x and y are fractions of its width and "
                    "height and must be between 0 and 1"
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Region:
    """A rectangle of a picture, as fractions of its width and height: its left upper corner (x, y), width and height.

    Raises TargetError unless it is a rectangle inside the picture.
    """

    x: float
    y: float
    width: float
    height: float

    def __post_init__(self) -> None:
        for start, size in ((self.x, self.width), (self.y, self.height)):
            if not (0.0 <= start < 1.0 and 0.0 < size <= 1.0 and start + size <= 1.0 + 1e-9):
                raise TargetError(
                    f"region ({self.x:g}, {self.y:g}) of {self.width:g} x {self.height:g} lies outside the picture: x, y, "
                    "width and height are fractions of the picture, between 0 and 1, and so are x + width and y + height"
                )

    @classmethod
    def whole(cls) -> Region:
        """The whole picture."""
        return cls(x=0.0, y=0.0, width=1.0, height=1.0)

    @property
    def is_whole(self) -> bool:
        return self == Region.whole()
