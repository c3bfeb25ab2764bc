"""A training's losses as a picture."""

from __future__ import annotations

import math

from torch import Tensor

from ..chart import Chart

TRAINING, VALIDATION = (150, 160, 175), (214, 72, 50)


def loss_plot(history: list[tuple[int, float, float | None]], title: str = "") -> Tensor:
    """Losses over steps on a logarithmic scale, (1, 400, 720, 3) in 0..1: each step's in grey, validations in red.

    history: step, loss, validation or None. What is not a positive number is left out.
    """
    lines = [
        [(step, loss) for step, loss, _ in history if _shown(loss)],
        [(step, check) for step, _, check in history if check is not None and _shown(check)],
    ]
    values = [math.log10(value) for line in lines for _, value in line] or [0.0]
    low, high = math.floor(min(values) * 4) / 4, math.ceil(max(values) * 4) / 4
    high = max(high, low + 0.25)
    last = max((step for step, _, _ in history), default=1)

    chart = Chart()
    chart.grid([str(round(last * k / 4)) for k in range(5)], [f"{10 ** (low + (high - low) * k / 4):.2g}" for k in range(5)])
    for line, colour, width_px in zip(lines, (TRAINING, VALIDATION), (1, 3), strict=True):
        chart.line([(step / last, (math.log10(value) - low) / (high - low)) for step, value in line], colour, width_px)
    best = min((check for _, check in lines[1]), default=None)
    words = [title, "loss of each step (grey)"] + ([] if best is None else [f"validation (red), best {best:.4g}"])
    chart.words("    ".join(word for word in words if word), "steps")
    return chart.picture()


def _shown(value: float) -> bool:
    return math.isfinite(value) and value > 0
