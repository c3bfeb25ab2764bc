"""A readout head: its network and what is known about it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from torch import Tensor

from ..errors import HeadFileError, TargetError
from ..types import HEAD_KINDS, HeadKind
from .aggregation import Activation, AggregationNetwork
from .pixel import PixelNetwork

Network = AggregationNetwork | PixelNetwork
TimestepConvention = Literal["t", "reversed"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadSpec:
    """What a head is, apart from its weights.

    feature_channels: channels of the maps that it reads, in tap order. taps: paths of the modules they come from; none: the
    backbone's own. control_range: value range of the control it was
    trained on (spatial, keypoint). use_emb: whether it is run with the timestep embedding. timestep_convention: ``t``
    if it was trained with the embedding of the timestep, ``reversed`` if with that of the reversed index (as the
    authors' training code does); guidance embeds t either way, as the authors' does. training: facts to read, not used.
    """

    kind: HeadKind
    feature_channels: tuple[int, ...]
    backbone: str = "unknown"
    taps: tuple[str, ...] = ()
    control_range: tuple[float, float] = (-0.5, 0.5)
    use_emb: bool = True
    timestep_convention: TimestepConvention = "t"
    activation: Activation = "tanh"
    training: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        low, high = self.control_range
        if not low < high:
            raise HeadFileError(f"control_range {self.control_range} is empty: the first number must be the smaller")
        for value, allowed, name in (
            (self.kind, HEAD_KINDS, "kind"),
            (self.timestep_convention, get_args(TimestepConvention), "timestep_convention"),
            (self.activation, get_args(Activation), "activation"),
        ):
            if value not in allowed:
                raise HeadFileError(f"head {name} {value!r} is unknown: expected one of {', '.join(allowed)}")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ReadoutHead:
    """A head ready to run: its network (fp32; frozen and in eval mode, which it is set to), its spec, where it came from."""

    network: Network
    spec: HeadSpec
    name: str

    def __post_init__(self) -> None:
        self.network.eval().requires_grad_(False)

    @property
    def output_channels(self) -> int:
        return self.network.output_channels

    @property
    def emb_width(self) -> int | None:
        """Width of the timestep embedding that it takes, None if it takes none."""
        return self.network.emb_width if self.network.emb_width and self.spec.use_emb else None

    def features_of(self, features: list[Tensor], taps: Sequence[str]) -> list[Tensor]:
        """The ones that it reads of those tapped at ``taps``."""
        if not set(self.spec.taps) < set(taps) or not self.spec.taps:
            return features
        return [features[taps.index(tap)] for tap in self.spec.taps]

    def read(
        self, features: list[Tensor], emb: Tensor | None, size: tuple[int, int], noise_level: Tensor | None = None,
        *, light: bool = False,
    ) -> Tensor:  # fmt: skip
        """The readout (B, D, H, W) of features at latent size.

        A per-pixel head (lgp) takes noise_level (B,), the others emb, unless they were trained without. light: keep little
        for backward, and run again then.
        """
        if isinstance(self.network, PixelNetwork):
            if noise_level is None:
                raise TargetError(f"head {self.name!r} reads the noise level: pass noise_level, (B,) in 0..1")
            return self.network(features, noise_level, size)
        return self.network(features, emb if self.spec.use_emb else None, size, light=light)
