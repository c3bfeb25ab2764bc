"""What the picture should be like: a head and what its readout is compared with."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import TargetError
from ..heads import ReadoutHead
from ..types import Drag, Region
from .keyframes import Keyframes

#: A crop of a control is taken of at least so many cells.
CROP_CELLS = 256


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Target:
    """One target; chained ones are reached through ``previous``.

    head: what reads. weight: its share of the loss. start_percent, end_percent: the part of the diffusion time in which
    it guides. image: the control of a spatial target, (B or 1, H, W, C) in 0..1, any size. readout: instead of it, what
    such a head reads in another picture, (B or 1, D, h, w); the control of a keypoint target. mask: (B or 1, H, W) in 0..1,
    where the loss counts; of a correspondence target, what may move. drags: of a correspondence target; frames: in so
    many steps; drag_aspect: width / height of the picture that they were drawn on, if it may differ from the latent's.
    reference_latent: (B or 1, C, h, w), of an appearance target; of an lgp target, the encoded sketch. reference_mask:
    (B or 1, H, W), what counts of an appearance target's reference. keyframes: of the weight over the diffusion time, which
    multiply it. Values of pictures outside 0..1 are clamped. Raises TargetError for anything missing or malformed.
    """

    head: ReadoutHead
    weight: float = 1.0
    start_percent: float = 0.0
    end_percent: float = 0.5
    image: Tensor | None = None
    mask: Tensor | None = None
    drags: tuple[Drag, ...] | None = None
    reference_latent: Tensor | None = None
    readout: Tensor | None = None
    reference_mask: Tensor | None = None
    frames: int = 1
    drag_aspect: float | None = None
    previous: Target | None = None
    keyframes: Keyframes | None = None

    def __post_init__(self) -> None:
        kind, name = self.head.spec.kind, self.head.name
        if not math.isfinite(self.weight) or self.weight < 0:
            raise TargetError(f"the weight of the target with head {name!r} is {self.weight}: it must be 0 or more")
        if not 0.0 <= self.start_percent <= 1.0 or not 0.0 <= self.end_percent <= 1.0:
            raise TargetError(
                f"start_percent {self.start_percent:g} and end_percent {self.end_percent:g} must lie between 0 and 1"
            )
        if self.start_percent >= self.end_percent:
            raise TargetError(
                f"start_percent {self.start_percent:g} is not before end_percent {self.end_percent:g}: the target would "
                "never guide. Lower the one or raise the other"
            )
        if kind == "spatial" and self.image is None and self.readout is None:
            raise TargetError(
                f"head {name!r} is spatial and needs a control picture: connect image (a pose, depth or edge map, as the "
                "head was trained on)"
            )
        if kind == "correspondence" and not self.drags:
            raise TargetError(f"head {name!r} is a correspondence head and needs drags: connect drag_points with an arrow")
        if kind == "keypoint" and self.readout is None:
            raise TargetError(
                f"head {name!r} is a keypoint head and needs heat maps, one a joint: connect readout (of Read Out "
                "with this head on a picture in the pose wanted)"
            )
        if kind == "lgp" and self.reference_latent is None and self.readout is None:
            raise TargetError(
                f"head {name!r} reads encoded edges and needs an encoded sketch: connect reference_latent (the edge "
                "map through VAE Encode)"
            )
        if self.image is not None:
            _check_picture(self.image, "image", 4, name)
            if kind == "spatial" and self.head.output_channels not in (1, self.image.shape[-1]):
                raise TargetError(
                    f"head {name!r} reads {self.head.output_channels} channels but image has {self.image.shape[-1]}: give a "
                    "picture with as many channels"
                )
        for what, mask in (("mask", self.mask), ("reference_mask", self.reference_mask)):
            if mask is not None:
                _check_picture(mask, what, 3, name)
        if self.reference_mask is not None and (kind != "appearance" or not bool((self.reference_mask > 0.5).any())):
            raise TargetError(
                f"reference_mask of the target with head {name!r} "
                + (
                    "is black: paint what to keep"
                    if kind == "appearance"
                    else f"is for appearance heads, and this is a {kind} head"
                )
            )
        if not 1 <= self.frames <= 1000:
            raise TargetError(f"frames is {self.frames}: it must be between 1 and 1000")
        if self.readout is not None and kind in ("appearance", "correspondence"):
            article = "an" if kind == "appearance" else "a"
            raise TargetError(f"head {name!r} is {article} {kind} head and follows no readout: disconnect readout")
        for what, maps in (("reference_latent", self.reference_latent), ("readout", self.readout)):
            if maps is None:
                continue
            _check_picture(maps, what, 4, name)
            if (what == "readout" or kind == "lgp") and self.head.output_channels not in (0, maps.shape[1]):
                raise TargetError(
                    f"head {name!r} reads {self.head.output_channels} channels but {what} has {maps.shape[1]}: give "
                    "what this head reads"
                )

    @property
    def needs_source(self) -> bool:
        """Whether its loss compares with the source's readouts."""
        kind = self.head.spec.kind
        return kind == "correspondence" or (kind == "appearance" and self.reference_latent is None)

    @property
    def needs_reference(self) -> bool:
        """Whether its loss compares with the readouts of its reference_latent."""
        return self.head.spec.kind == "appearance" and self.reference_latent is not None

    def weight_at(self, percent: float, batch: int) -> Tensor | float:
        """Its share of the loss at a part of the diffusion time; with keyframes, that of each picture, (B,) float32."""
        return self.weight if self.keyframes is None else self.weight * self.keyframes.at(percent, batch)

    def check_batch(self, batch: int) -> None:
        """Raises TargetError unless every picture and every keyframe given is one or one for each of ``batch`` latents."""
        for what, tensor in _batched(self):
            if tensor is not None and tensor.shape[0] not in (1, batch):
                raise TargetError(
                    f"{what} of the target with head {self.head.name!r} is a batch of {tensor.shape[0]} but {batch} "
                    f"{'picture is' if batch == 1 else 'pictures are'} being made: give one, or one for each"
                )
        if self.keyframes is not None:
            try:
                self.keyframes.check_batch(batch)
            except TargetError as error:
                raise TargetError(f"keyframes of the target with head {self.head.name!r}: {error}") from error

    def control(self, size: tuple[int, int], batch: int, device: torch.device) -> Tensor | None:
        """What a spatial, keypoint or lgp readout should be, (B, D, H, W) in the head's own range at latent size, else
        None."""
        kind = self.head.spec.kind
        if kind not in ("spatial", "keypoint", "lgp"):
            return None
        given = self.reference_latent if kind == "lgp" and self.readout is None else self.readout
        if given is not None:
            return fit(given.clone().to(device, torch.float32), size).expand(batch, -1, -1, -1)
        assert self.image is not None
        picture = self.image.clone().to(device, torch.float32).movedim(-1, 1)  # (B, C, H, W)
        picture = fit(picture.clamp(0, 1), size)
        if self.head.output_channels == 1:
            picture = picture.mean(1, keepdim=True)
        low, high = self.head.spec.control_range
        return (low + (high - low) * picture).expand(batch, -1, -1, -1)

    @property
    def drag_frames(self) -> int:
        """The frames of the chain's drags: the most that any of its targets asks for."""
        own = self.frames if self.weight > 0 else 1
        return max(own, 1 if self.previous is None else self.previous.drag_frames)

    def at_frame(self, number: int) -> Target:
        """The chain with its drags taken so far as frame ``number`` (1 .. drag_frames) of them goes."""
        share = number / self.drag_frames
        drags = self.drags and tuple(_part_of(drag, share) for drag in self.drags)
        previous = self.previous and dataclasses.replace(self.previous, frames=self.drag_frames).at_frame(number)
        return dataclasses.replace(self, drags=drags, frames=1, previous=previous)

    def counts_at(self, percent: float) -> bool:
        """Whether it has any weight at this place of the diffusion time."""
        return self.weight > 0 and (self.keyframes is None or self.keyframes.most(percent) > 0)

    def cropped(self, region: Region) -> Target | None:
        """The target, without those before it, for a crop of the picture that is sampled by itself: its pictures and masks
        cropped likewise, its drags those that stay inside. None if nothing is left of it.

        What an identity target keeps (reference_mask) is of another picture, and stays whole.
        """
        places: dict[str, Tensor | None] = {}
        for name in ("image", "mask", "readout", "reference_latent"):
            value = getattr(self, name)
            if value is None or (name == "reference_latent" and self.reference_mask is not None):
                continue
            places[name] = _window(value, region, channels_last=name == "image")
        drags = self.drags and tuple(moved for drag in self.drags if (moved := _inside(drag, region)) is not None)
        mask = places.get("mask")
        if (self.drags and not drags) or (mask is not None and not bool(mask.max() > 0)):
            return None
        return dataclasses.replace(self, **places, drags=drags, drag_aspect=None, previous=None)  # type: ignore[arg-type]

    def region(
        self, size: tuple[int, int], batch: int, device: torch.device, which: Literal["mask", "reference_mask"] = "mask"
    ) -> Tensor | None:
        """A mask (B, 1, H, W) at latent size, None if it has none."""
        mask = getattr(self, which)
        if mask is None:
            return None
        region = fit(mask.clone().to(device, torch.float32)[:, None].clamp(0, 1), size)
        if mask.max() > 0 and not region.max() > 0:
            raise TargetError(
                f"{which} of the target with head {self.head.name!r} is white only where it is cropped away, since the "
                f"picture that is made has the aspect {size[1]}:{size[0]}: paint it nearer to the centre"
            )
        return region.expand(batch, -1, -1, -1)


def _window(value: Tensor, region: Region, channels_last: bool) -> Tensor:
    """A window of pictures (B, H, W, C), masks (B, H, W) or maps (B, C, H, W); small ones are enlarged first, so that its
    edges fall where they should."""
    maps = value.movedim(-1, 1) if channels_last else value[:, None] if value.ndim == 3 else value
    height, width = maps.shape[-2:]
    times = max(1, math.ceil(CROP_CELLS / max(1.0, min(region.width * width, region.height * height))))
    if times > 1:
        maps = F.interpolate(maps.float(), scale_factor=times, mode="nearest")
        height, width = height * times, width * times
    left, top = (round(a * b) for a, b in ((region.x, width), (region.y, height)))
    right, bottom = round((region.x + region.width) * width), round((region.y + region.height) * height)
    maps = maps[..., max(top, 0) : max(bottom, top + 1), max(left, 0) : max(right, left + 1)]
    return maps.movedim(1, -1) if channels_last else maps[:, 0] if value.ndim == 3 else maps


def _inside(drag: Drag, region: Region) -> Drag | None:
    """A drag as fractions of a window; None if it leaves it."""
    ends = [((x - region.x) / region.width, (y - region.y) / region.height) for x, y in (drag.start, drag.end)]
    return Drag(*ends) if all(0 <= x <= 1 and 0 <= y <= 1 for x, y in ends) else None


def _part_of(drag: Drag, share: float) -> Drag:
    (x0, y0), (x1, y1) = drag.start, drag.end
    if share == 1:
        return drag
    return Drag(drag.start, (x0 + share * (x1 - x0), y0 + share * (y1 - y0)))


def chain(target: Target | None) -> tuple[Target, ...]:
    """The targets that count, first to last; those of weight 0 are left out."""
    found: list[Target] = []
    while target is not None:
        if target.weight > 0:
            found.append(target)
        target = target.previous
    return tuple(reversed(found))


def fit(picture: Tensor, size: tuple[int, int]) -> Tensor:
    """Crop (B, C, H, W) to the aspect ratio of ``size`` about its centre, as ControlNet nodes do, and resize.

    Shrinking averages (each cell sees its own area), enlarging interpolates.
    """
    height, width = picture.shape[-2:]
    ratio = size[1] / size[0]
    crop_h, crop_w = min(height, round(width / ratio)), min(width, round(height * ratio))
    top, left = (height - crop_h) // 2, (width - crop_w) // 2
    picture = picture[..., top : top + max(crop_h, 1), left : left + max(crop_w, 1)]
    if picture.shape[-2:] == size:
        return picture
    if picture.shape[-2] >= size[0] and picture.shape[-1] >= size[1]:
        return F.interpolate(picture, size, mode="area")
    return F.interpolate(picture, size, mode="bilinear")


def _batched(target: Target) -> tuple[tuple[str, Tensor | None], ...]:
    return tuple(
        (name, getattr(target, name)) for name in ("image", "mask", "reference_latent", "reference_mask", "readout")
    )


def _check_picture(tensor: Tensor, what: str, dims: int, head: str) -> None:
    if tensor.ndim != dims or 0 in tensor.shape:
        raise TargetError(
            f"{what} of the target with head {head!r} has shape {tuple(tensor.shape)}: expected {dims} dimensions, "
            "none of them empty"
        )
    if not torch.isfinite(tensor).all():
        raise TargetError(
            f"{what} of the target with head {head!r} holds NaN or infinite values: look at the node that made it"
        )
