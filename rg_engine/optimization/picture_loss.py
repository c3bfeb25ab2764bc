"""What a finished picture should be: weighted losses in a chain, each a function of pixels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..errors import OptimizationError

#: Pictures (B, 3, H, W) as the VAE gives them (-1..1, not clamped), and what crops are drawn with, to a loss each, (B,).
Measure = Callable[[Tensor, torch.Generator], Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PictureLoss:
    """One loss, and those before it in the chain. Raises OptimizationError for a weight that is no number."""

    name: str
    measure: Measure
    weight: float = 1.0
    previous: PictureLoss | None = None

    def __post_init__(self) -> None:
        if not torch.isfinite(torch.tensor(self.weight)):
            raise OptimizationError(f"the weight of the loss {self.name!r} is {self.weight}: give a number")

    def __iter__(self) -> Iterator[PictureLoss]:
        """The chain, first things first."""
        if self.previous is not None:
            yield from self.previous
        yield self

    def counted(self) -> tuple[PictureLoss, ...]:
        """Those whose weight is not 0. Raises OptimizationError if there are none."""
        found = tuple(loss for loss in self if loss.weight != 0)
        if not found:
            raise OptimizationError("every loss has weight 0, so nothing would be optimized: give one of them a weight")
        return found

    def check_batch(self, count: int) -> None:
        """Raises OptimizationError for a loss with pictures of its own that are neither one nor ``count``."""
        for loss in self.counted():
            own = getattr(loss.measure, "pictures", 1)
            if own not in (1, count):
                raise OptimizationError(
                    f"the loss {loss.name!r} compares with a batch of {own} and {count} "
                    f"{'picture is' if count == 1 else 'pictures are'} being made: give one, or one for each"
                )

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """The weighted sum, (B,)."""
        return torch.stack([loss.weight * loss.measure(images, generator) for loss in self.counted()]).sum(0)
