"""A chart's frame: grid, labels, lines and words, drawn with Pillow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

SIZE_PX = (720, 400)
MARGINS_PX = (64, 28, 20, 40)  # left, top, right, bottom
GRID, LABELS = (228, 228, 228), (90, 90, 90)

Colour = tuple[int, int, int]


class Chart:
    """An empty chart of 720 x 400 px, on which places are shares of its field: (0, 0) lower left, (1, 1) upper right."""

    def __init__(self) -> None:
        self._image = Image.new("RGB", SIZE_PX, "white")
        self._pen = ImageDraw.Draw(self._image)
        left, top, right, bottom = MARGINS_PX
        self._field = left, top, SIZE_PX[0] - left - right, SIZE_PX[1] - top - bottom

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Where a point of the field is, in px."""
        left, top, width, height = self._field
        return left + width * x, top + height * (1 - y)

    def grid(self, across: Sequence[str], up: Sequence[str]) -> None:
        """Evenly spaced labels below and at the left, with lines at those on the left."""
        left, top, width, height = self._field
        for k, words in enumerate(up):
            y = self.place(0, k / (len(up) - 1))[1]
            self._pen.line((left, y, left + width, y), fill=GRID)
            self._pen.text((8, y - 6), words, fill=LABELS)
        for k, words in enumerate(across):
            self._pen.text((left + width * k / (len(across) - 1) - 8, top + height + 8), words, fill=LABELS)

    def line(self, points: Sequence[tuple[float, float]], colour: Colour, width_px: int) -> None:
        """A line through points of the field; a dot if there is only one."""
        if len(points) > 1:
            self._pen.line([self.place(*point) for point in points], fill=colour, width=width_px)
        elif points:
            self.dot(points[0], colour)

    def dot(self, point: tuple[float, float], colour: Colour) -> None:
        x, y = self.place(*point)
        self._pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)

    def words(self, title: str, below: str) -> None:
        """A line above the field, and a word below it at the right."""
        left, top, width, height = self._field
        self._pen.text((left, 8), title, fill="black")
        self._pen.text((left + width - 6 * len(below), top + height + 22), below, fill=LABELS)

    def save(self, path: Path) -> None:
        self._image.save(path)

    def picture(self) -> Tensor:
        """The chart as it is now, (1, 400, 720, 3) in 0..1."""
        return torch.from_numpy(np.asarray(self._image, dtype=np.float32) / 255)[None]
