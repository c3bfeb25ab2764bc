"""The loss of one branch of one sampler step: the weighted sum over targets of each readout's loss."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import TargetError
from ..heads import ReadoutHead
from ..losses import appearance_loss, correspondence_loss, identity_loss, matching_loss, sketch_loss, spatial_loss
from ..losses.correspondence import Window, gather
from .parts import Part, stitched
from .targets import Target


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceStep:
    """What is kept of one branch of one step of the source: each target's readout, and min and max of z a picture."""

    readouts: dict[int, Tensor]  # by the target's place in the chain, (B, D, H, W)
    z_min: Tensor  # (B,)
    z_max: Tensor  # (B,)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Branch:
    """What one branch (conditional or unconditional) of one step gave.

    features: tapped maps; emb (B, E); z (B, C, H, W), the network's input latent, without a graph; noise_level (B,);
    percent, its place in the diffusion time, where targets have keyframes.
    """

    features: list[Tensor]
    emb: Tensor
    z: Tensor
    noise_level: Tensor | None = None  # per-pixel heads need it
    percent: float = 0.0


class Objective:
    """The loss of a chain of targets on latents of one size; controls and masks are prepared once.

    Args: targets, a chain; size (H, W) of the latent; batch, number of pictures; device where the features are; taps, the
    features' (none: heads read all of them); paper_drags, drags by the paper's guidance loss, not by matching.
    """

    def __init__(
        self, targets: Sequence[Target], size: tuple[int, int], batch: int, device: torch.device, *,
        paper_drags: bool = False, taps: Sequence[str] = (),
    ) -> None:  # fmt: skip
        for target in targets:
            target.check_batch(batch)
        self.targets = tuple(targets)
        self.size = size
        self._paper_drags, self._taps = paper_drags, tuple(taps)
        self._controls = [target.control(size, batch, device) for target in targets]
        self._regions = [target.region(size, batch, device) for target in targets]
        self._reference_regions = [target.region(size, batch, device, "reference_mask") for target in targets]
        self._drags = [_points(target, size, device) for target in targets]
        self._batch = batch
        self._part = Part()
        self._window: Window | None = None
        self._shares: list[Tensor | float] = [1.0] * len(self.targets)
        self._check_drags()

    def part(self, part: Part) -> Objective:
        """The objective of a part of the pictures; its loss is that part's share of theirs."""
        if part.whole:
            return self
        other = copy.copy(self)
        for name in ("_controls", "_regions"):
            setattr(other, name, [None if maps is None else part.of(maps) for maps in getattr(self, name)])
        other._reference_regions = [m if m is None else part.of_pictures(m) for m in self._reference_regions]
        height, width = self.size
        if part.down is not None and part.across is not None:
            other.size = (len(part.down), len(part.across))
            corner = (float(part.across[0]) / width, float(part.down[0]) / height)
            other._window = (*corner, other.size[1] / width, other.size[0] / height)
        other._part = part
        cells = other.size[0] * other.size[1] / (height * width)
        other._shares = [
            1.0 if drags is not None else cells if whole is None else _mass(part.of(whole)) / _mass(part.of_pictures(whole))
            for whole, drags in zip(self._regions, self._drags, strict=True)
        ]
        return other

    def _check_drags(self) -> None:
        """An arrow that starts where its mask lets nothing move contradicts it."""
        for target, region, drags in zip(self.targets, self._regions, self._drags, strict=True):
            if drags is None or region is None:
                continue
            starts, ends = drags
            held = gather(region, starts).amax(0)[0] < 0.5  # (N,)
            held &= (ends - starts).norm(dim=1) > 0
            if held.any():
                raise TargetError(
                    f"drag {int(held.nonzero()[0]) + 1} of head {target.head.name!r} starts where the mask is black, so "
                    "that nothing there may move: draw the mask over it, or remove the arrow"
                )

    @property
    def movable(self) -> Tensor | None:
        """Where drags may move something, (B, 1, H, W) in 0..1; None for everywhere."""
        regions = [
            region
            for target, region in zip(self.targets, self._regions, strict=True)
            if target.head.spec.kind == "correspondence"
        ]
        found = [region for region in regions if region is not None]
        return torch.stack(found).amax(0) if found and len(found) == len(regions) else None

    @property
    def needs_source(self) -> bool:
        return any(target.needs_source for target in self.targets)

    def reaches_zero(self, active: Sequence[int]) -> bool:
        """Whether the least value of these targets' loss is 0: of a look or a drag nobody knows it."""
        return all(self.targets[i].head.spec.kind in ("spatial", "keypoint", "lgp") for i in active)

    def source_step(self, branch: Branch, wanted: Sequence[int] | None = None) -> SourceStep:
        """What the guided pass needs of this step of the source, or of a reference: the readouts of targets ``wanted``."""
        if wanted is None:
            wanted = [i for i, target in enumerate(self.targets) if target.needs_source]
        low, high = _extremes(branch.z)
        readouts = self._read(branch, wanted)
        return SourceStep(readouts={i: r.detach() for i, r in readouts.items()}, z_min=low, z_max=high)

    def loss(
        self, branch: Branch, active: Sequence[int], source: SourceStep | None = None, *, light: bool = False
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """The loss of each picture, (B,), and the readouts it came from, by target.

        ``active`` names the targets that guide at this step. z's extent is taken over source and guided picture together.
        light: heads keep little for backward.
        """
        low, high = _extremes(branch.z)
        if source is not None:
            low = torch.minimum(low, self._part.of_pictures(source.z_min))
            high = torch.maximum(high, self._part.of_pictures(source.z_max))
        z_extent = high - low
        readouts = self._read(branch, active, light)
        total = torch.zeros_like(z_extent)
        for i in active:
            weight = self.targets[i].weight_at(branch.percent, self._batch)
            if isinstance(weight, Tensor):
                weight = self._part.of_pictures(weight.to(z_extent.device))
            total = total + weight * self._shares[i] * self._one_loss(i, readouts[i].float(), source, z_extent)
        return total, readouts

    def _one_loss(self, i: int, readout: Tensor, source: SourceStep | None, z_extent: Tensor) -> Tensor:
        spec, mask = self.targets[i].head.spec, self._regions[i]
        match spec.kind:
            case "spatial" | "keypoint":
                control = self._controls[i]
                assert control is not None
                return spatial_loss(readout, control, control_range=spec.control_range, z_extent=z_extent, mask=mask)
            case "lgp":
                control = self._controls[i]
                assert control is not None
                return sketch_loss(readout, control, mask=mask)
            case "appearance":
                assert source is not None
                reference, where = self._part.of_pictures(source.readouts[i]).float(), self._reference_regions[i]
                if where is not None:
                    return identity_loss(readout, reference, reference_mask=where, z_extent=z_extent, mask=mask)
                return appearance_loss(readout, self._part.of_cells(reference), z_extent=z_extent, mask=mask)
            case "correspondence":
                assert source is not None
                starts, ends = self._drags[i]  # type: ignore[misc]
                reference = self._part.of_pictures(source.readouts[i]).float()
                loss = correspondence_loss if self._paper_drags else matching_loss
                return loss(readout, reference, starts=starts, ends=ends, window=self._window)

    def by_head(self, active: Sequence[int]) -> list[tuple[int, ...]]:
        """Targets in groups of one head."""
        groups: dict[ReadoutHead, list[int]] = {}
        for i in active:
            groups.setdefault(self.targets[i].head, []).append(i)
        return [tuple(group) for group in groups.values()]

    def _read(self, branch: Branch, wanted: Sequence[int], light: bool = False) -> dict[int, Tensor]:
        """Readouts of the targets wanted; targets that share a head share its readout."""
        readouts: dict[int, Tensor] = {}
        for group in self.by_head(wanted):
            head = self.targets[group[0]].head
            features = head.features_of(branch.features, self._taps)
            readout = head.read(features, branch.emb, self.size, branch.noise_level, light=light)
            readouts |= dict.fromkeys(group, readout)
        return readouts


def whole_step(parts: list[tuple[Part, SourceStep]], latent: Tensor) -> SourceStep:
    """Steps of parts of the pictures as one."""
    if parts[0][0].whole:
        return parts[0][1]
    low, high = (latent.new_full((len(latent),), value, dtype=torch.float32) for value in (torch.inf, -torch.inf))
    for part, step in parts:
        pictures = part.of_pictures(torch.arange(len(latent), device=latent.device))
        low[pictures], high[pictures] = torch.minimum(low[pictures], step.z_min), torch.maximum(high[pictures], step.z_max)
    names = parts[0][1].readouts
    readouts = {i: stitched([(part, step.readouts[i]) for part, step in parts], latent) for i in names}
    return SourceStep(readouts=readouts, z_min=low, z_max=high)


def _extremes(z: Tensor) -> tuple[Tensor, Tensor]:
    flat = z.detach().float().flatten(1)
    return flat.amin(1), flat.amax(1)


def _mass(mask: Tensor) -> Tensor:
    """The sum of a mask (B, 1, H, W), (B,)."""
    return mask.flatten(1).sum(1).clamp_min(1e-6)


def _points(target: Target, size: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor] | None:
    """Starts and ends (N, 2) as fractions of the latent, which is the picture cropped to its aspect about the centre."""
    if not target.drags:
        return None
    points = torch.tensor([[drag.start, drag.end] for drag in target.drags], device=device, dtype=torch.float32)  # (N, 2, 2)
    if target.drag_aspect is not None:
        ratio = target.drag_aspect / (size[1] / size[0])  # above 1: the picture is wider than the latent
        stretch = torch.tensor([max(ratio, 1.0), max(1 / ratio, 1.0)], device=device)
        points = (points - 0.5) * stretch + 0.5
        outside = ((points < -1e-3) | (points > 1 + 1e-3)).flatten(1).any(1)
        if outside.any():
            raise TargetError(
                f"drag {int(outside.nonzero()[0]) + 1} of head {target.head.name!r} leaves the picture that is made: "
                f"it has the aspect {size[1]}:{size[0]}, so that the arrows' picture is cropped. Make the latent of "
                "the picture's aspect"
            )
        points = points.clamp(0, 1)
    return points[:, 0], points[:, 1]
