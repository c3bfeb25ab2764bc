"""A training's losses as a picture."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

SIZE_PX = (720, 400)
MARGINS_PX = (64, 28, 20, 40)  # left, top, right, bottom
TRAINING, VALIDATION = (150, 160, 175), (214, 72, 50)


def loss_plot(history: list[tuple[int, float, float | None]], title: str = "") -> Tensor:
    """Losses over steps on a logarithmic scale, (1, 400, 720, 3) in 0..1: each step's in grey, validations in red.

    history: step, loss, validation or None. What is not a positive number is left out.
    """
    image = Image.new("RGB", SIZE_PX, "white")
    pen = ImageDraw.Draw(image)
    left, top, right, bottom = MARGINS_PX
    width, height = SIZE_PX[0] - left - right, SIZE_PX[1] - top - bottom
    lines = [
        [(step, loss) for step, loss, _ in history if _shown(loss)],
        [(step, check) for step, _, check in history if check is not None and _shown(check)],
    ]
    values = [math.log10(value) for line in lines for _, value in line] or [0.0]
    low, high = math.floor(min(values) * 4) / 4, math.ceil(max(values) * 4) / 4
    high = max(high, low + 0.25)
    last = max((step for step, _, _ in history), default=1)

    def place(step: float, value: float) -> tuple[float, float]:
        return left + width * step / last, top + height * (high - math.log10(value)) / (high - low)

    for k in range(5):
        value = 10 ** (low + (high - low) * k / 4)
        y = place(0, value)[1]
        pen.line((left, y, left + width, y), fill=(228, 228, 228))
        pen.text((8, y - 6), f"{value:.2g}", fill=(90, 90, 90))
        x = left + width * k / 4
        pen.text((x - 8, top + height + 8), f"{round(last * k / 4)}", fill=(90, 90, 90))
    for line, colour, thickness in zip(lines, (TRAINING, VALIDATION), (1, 3), strict=True):
        if len(line) > 1:
            pen.line([place(*point) for point in line], fill=colour, width=thickness)
        elif line:
            x, y = place(*line[0])
            pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)
    best = min((check for _, check in lines[1]), default=None)
    words = [title, "loss of each step (grey)"] + ([] if best is None else [f"validation (red), best {best:.4g}"])
    pen.text((left, 8), "    ".join(word for word in words if word), fill="black")
    pen.text((left + width - 30, top + height + 22), "steps", fill=(90, 90, 90))
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)[None]


def _shown(value: float) -> bool:
    return math.isfinite(value) and value > 0
