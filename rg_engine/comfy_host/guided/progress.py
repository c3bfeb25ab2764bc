"""What is seen while a guided run goes on: ComfyUI's preview with the readout beside it, the loss and the time a step."""

from __future__ import annotations

import statistics
import time
from typing import Any

import comfy.utils
import latent_preview
import numpy as np
from PIL import Image
from torch import Tensor

from ...guidance.pictures import as_image, readout_picture
from .report import show
from .step import Run

PREVIEW_PX = 512


class RunProgress:
    """Tells the page about the steps of one run; without a page, or with previews off, it does nothing."""

    def __init__(self, run: Run, model: Any) -> None:
        self._run = run
        self._previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)
        self._bar = comfy.utils.ProgressBar(len(run.sigmas) - 1)
        self._began = self._before = time.perf_counter()
        self._guided = 0  # steps, so far
        self._seconds: dict[str, list[float]] = {"plain": [], "guided": [], "source": []}
        self._last = max((planned.step for planned in run.plan.steps), default=-1)

    def step(self, step: int, done: int, total: int, x0: Tensor) -> None:
        """After ComfyUI's own report of a step: ``done`` steps of ``total`` over all passes."""
        run, now = self._run, time.perf_counter()
        kind = "source" if run.recording else "guided" if len(run.guided) > self._guided else "plain"
        self._seconds[kind].append(now - self._before)
        self._before, self._guided = now, len(run.guided)
        seconds = (time.perf_counter() - self._began) / max(done, 1)
        words = f"step {done} of {total}, {seconds:.2f} s a step"
        if run.recording:
            words += ", source picture"
        elif run.losses:
            words += f", loss {float(run.losses[-1].mean()):.4g}"
        show(words)
        if self._previewer is None or not run.readouts or step > self._last:
            return
        _, preview, _ = self._previewer.decode_latent_to_preview_image("JPEG", x0)
        self._bar.update_absolute(done, total, ("JPEG", beside(preview, self._readouts()), PREVIEW_PX * 2))

    @property
    def seconds_added(self) -> float | None:
        """What guided steps took more than plain ones, and the source pass; None where no plain step was seen."""
        if not self._seconds["plain"]:
            return None
        plain = statistics.median(self._seconds["plain"])
        return sum(self._seconds["source"]) + sum(seconds - plain for seconds in self._seconds["guided"])

    def _readouts(self) -> list[Image.Image]:
        assert self._run.objective is not None
        pictures = []
        for i, readout in self._run.readouts.items():
            shown = readout_picture(readout[:1].cpu(), self._run.objective.targets[i].head.spec, (256, 256))[0]
            pictures.append(as_image(shown))
        return pictures


def beside(preview: Image.Image, readouts: list[Image.Image]) -> Image.Image:
    """The preview and the readouts in a row, all as high as the preview is made."""
    height = min(PREVIEW_PX, max(preview.height, 128))
    size = (max(1, round(preview.width * height / preview.height)), height)
    row = [np.asarray(picture.convert("RGB").resize(size)) for picture in (preview, *readouts)]
    return Image.fromarray(np.concatenate(row, 1))
