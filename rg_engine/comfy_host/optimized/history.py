"""What is seen of an optimization: each picture on the node as it is made; in the end all of them, and their losses."""

from __future__ import annotations

import time

import comfy.utils
import torch
from torch import Tensor
from torch.nn import functional as F

from ...guidance.pictures import as_image
from ...training.plot import loss_plot
from ..guided.report import show
from .optimizer import Seen

PREVIEW_PX = 512
#: Pictures are kept no larger than this, and no more of them, so that many updates of large ones take little memory.
KEPT_PX, MOST = 512, 64


class History:
    """losses: the mean over the batch, one a picture; best: the lowest of each row, (B,)."""

    def __init__(self, updates: int, steps: int) -> None:
        self.losses: list[float] = []
        self.best = torch.full((1,), torch.inf)
        self._steps, self._total = steps, (updates + 1) * steps
        self._every = max(1, -(-(updates + 1) // MOST))
        self._kept: list[Tensor] = []
        self._bar = comfy.utils.ProgressBar(self._total)
        self._began = time.perf_counter()

    def tick(self, picture: int, step: int) -> None:
        self._bar.update_absolute(picture * self._steps + step, self._total)

    def add(self, seen: Seen) -> None:
        self.losses.append(float(seen.losses.mean()))
        self.best = torch.fmin(self.best, seen.losses)
        picture = _row(seen.images)
        if seen.update % self._every == 0 or bool(seen.best.any()):
            if len(self._kept) >= 2 * MOST:  # of a long way down, the earlier half is thinned
                self._kept = self._kept[::2]
            self._kept.append(picture)
        seconds = (time.perf_counter() - self._began) / len(self.losses)
        show(f"picture {len(self.losses)}, loss {self.losses[-1]:.4g}, best {min(self.losses):.4g}, {seconds:.1f} s each")
        preview = ("JPEG", as_image(picture), PREVIEW_PX)
        self._bar.update_absolute((seen.update + 1) * self._steps, self._total, preview)

    def pictures(self) -> Tensor:
        """IMAGE (n, h, w, 3), the pictures of a batch side by side."""
        return torch.stack(self._kept)

    def plot(self) -> Tensor:
        return loss_plot([(i + 1, loss, None) for i, loss in enumerate(self.losses)], "loss of the finished picture")


def _row(images: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in -1..1, side by side and no larger than is kept, (h, w, 3) in 0..1, on the CPU."""
    pixels = (images.float().cpu() / 2 + 0.5).clamp(0, 1)
    scale = KEPT_PX / max(pixels.shape[-2:])
    if scale < 1:
        size = [max(1, round(side * scale)) for side in pixels.shape[-2:]]
        pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True)
    return torch.cat(list(pixels.movedim(1, -1)), 1)
