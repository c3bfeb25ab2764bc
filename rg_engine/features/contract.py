"""What is known of a network that can be tapped."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from itertools import groupby

from torch import Tensor

from ..errors import BackboneError
from .layouts import Tokens
from .noise_embedding import noise_embedding


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tap:
    """A module whose output holds features. layout: how it becomes a map; None: it is one."""

    path: str
    channels: int
    layout: Tokens | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Backbone:
    """A network's taps: paths of the modules whose outputs hold the features, in the order in which they run.

    channels, layouts: of the taps (no layout: the output is a map). emb_tap: the module that gives emb; None where it is
    made of the noise level. available: all that could be tapped. blocks: paths of a transformer's blocks in the order in
    which they run; each can run again as a whole. streams: how many tensors of a block's width are kept of each token that
    it handles. names_kernel: whether its blocks let a node choose the attention kernel.
    """

    name: str
    taps: tuple[str, ...]
    channels: tuple[int, ...]
    emb_tap: str | None
    emb_width: int
    layouts: tuple[Tokens | None, ...] = ()
    available: tuple[Tap, ...] = ()
    blocks: tuple[str, ...] = ()
    streams: float = 0.0
    names_kernel: bool = True

    @property
    def is_transformer(self) -> bool:
        return bool(self.blocks)

    @property
    def depth(self) -> int:
        """How many of the blocks have run at the last tap; 0 of a UNet."""
        return self.blocks.index(self.taps[-1]) + 1 if self.blocks else 0

    def layout(self, path: str) -> Tokens | None:
        return self.layouts[self.taps.index(path)] if self.layouts else None

    def at(self, paths: Iterable[str]) -> Backbone:
        """With these taps in use. Raises BackboneError for one that it has not."""
        wanted = set(paths)
        tapped = [tap for tap in self.available if tap.path in wanted]
        missing = sorted(wanted - {tap.path for tap in tapped})
        if missing:
            known = [tap.path for tap in self.available]
            listed = ", ".join(known) if len(known) < 8 else f"{known[0]} ... {known[-1]}"
            raise BackboneError(f"{self.name} has no {missing[0]!r} to read: expected one of {listed}")
        return dataclasses.replace(
            self, taps=tuple(tap.path for tap in tapped), channels=tuple(tap.channels for tap in tapped),
            layouts=tuple(tap.layout for tap in tapped),
        )  # fmt: skip

    def emb(self, found: Tensor | None, noise_level: Tensor) -> Tensor:
        """The embedding (B, E) that heads take: the network's own, ``found``, or else one of the noise level (B,)."""
        return noise_embedding(noise_level) if found is None else found

    def describe(self) -> str:
        read = f" at {', '.join(self.taps)}" if self.is_transformer else ""
        return f"{self.name} ({describe_maps(self.channels)}{read})"


def describe_maps(channels: tuple[int, ...]) -> str:
    """'9 maps: 3x1280, 3x640, 3x320'."""
    runs = [(value, len(list(run))) for value, run in groupby(channels)]
    maps = "map" if len(channels) == 1 else "maps"
    listed = ", ".join(f"{count}x{value}" if count > 1 else str(value) for value, count in runs)
    return f"{len(channels)} {maps}: {listed}"
