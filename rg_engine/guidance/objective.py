"""The loss of one branch of one sampler step: the weighted sum over targets of each readout's loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from ..heads import ReadoutHead
from ..losses import appearance_loss, correspondence_loss, sketch_loss, spatial_loss
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

    features: tapped maps; emb (B, E); z (B, C, H, W), the network's input latent, without a graph; noise_level (B,).
    """

    features: list[Tensor]
    emb: Tensor
    z: Tensor
    noise_level: Tensor | None = None  # per-pixel heads need it


class Objective:
    """The loss of a chain of targets on latents of one size; controls and masks are prepared once.

    Args: targets, a chain; size (H, W) of the latent; batch, number of pictures; device where the features are.
    """

    def __init__(
        self, targets: Sequence[Target], size: tuple[int, int], batch: int, device: torch.device, *, truncate: bool = False
    ) -> None:
        for target in targets:
            target.check_batch(batch)
        self.targets = tuple(targets)
        self.size = size
        self._truncate = truncate
        self._controls = [target.control(size, batch, device) for target in targets]
        self._regions = [target.region(size, batch, device) for target in targets]
        self._drags = [_points(target, device) for target in targets]

    @property
    def needs_source(self) -> bool:
        return any(target.needs_source for target in self.targets)

    def source_step(self, branch: Branch, wanted: Sequence[int] | None = None) -> SourceStep:
        """What the guided pass needs of this step of the source, or of a reference: the readouts of targets ``wanted``."""
        if wanted is None:
            wanted = [i for i, target in enumerate(self.targets) if target.needs_source]
        low, high = _extremes(branch.z)
        readouts = self._read(branch, wanted)
        return SourceStep(readouts={i: r.detach() for i, r in readouts.items()}, z_min=low, z_max=high)

    def loss(
        self, branch: Branch, active: Sequence[int], source: SourceStep | None = None
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """The loss of each picture, (B,), and the readouts it came from, by target.

        ``active`` names the targets that guide at this step. z's extent is taken over source and guided picture together.
        """
        low, high = _extremes(branch.z)
        if source is not None:
            low, high = torch.minimum(low, source.z_min), torch.maximum(high, source.z_max)
        z_extent = high - low
        readouts = self._read(branch, active)
        total = torch.zeros_like(z_extent)
        for i in active:
            target, readout = self.targets[i], readouts[i].float()
            total = total + target.weight * self._one_loss(i, readout, source, z_extent)
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
                return appearance_loss(readout, source.readouts[i].float(), z_extent=z_extent, mask=mask)
            case "correspondence":
                assert source is not None
                starts, ends = self._drags[i]  # type: ignore[misc]
                reference = source.readouts[i].float()
                return correspondence_loss(readout, reference, starts=starts, ends=ends, truncate=self._truncate)

    def _read(self, branch: Branch, wanted: Sequence[int]) -> dict[int, Tensor]:
        """Readouts of the targets wanted; targets that share a head share its readout."""
        by_head: dict[ReadoutHead, Tensor] = {}
        for i in wanted:
            head = self.targets[i].head
            if head not in by_head:
                by_head[head] = head.read(branch.features, branch.emb, self.size, branch.noise_level)
        return {i: by_head[self.targets[i].head] for i in wanted}


def _extremes(z: Tensor) -> tuple[Tensor, Tensor]:
    flat = z.detach().float().flatten(1)
    return flat.amin(1), flat.amax(1)


def _points(target: Target, device: torch.device) -> tuple[Tensor, Tensor] | None:
    if not target.drags:
        return None
    starts = torch.tensor([drag.start for drag in target.drags], device=device, dtype=torch.float32)
    ends = torch.tensor([drag.end for drag in target.drags], device=device, dtype=torch.float32)
    return starts, ends
