"""What was measured at each mixing step that was tried, as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from ..chart import Chart, Colour
from .boundary import LAST_TIMESTEP
from .search import Tried

ACCURACY: dict[str, Colour] = {"z": (70, 120, 200), "region": (70, 120, 200), "h": (140, 100, 190)}
FLIP: Colour = (40, 150, 90)
CHANGE: Colour = (214, 72, 50)
CHOSEN: Colour = (190, 190, 190)


def boundary_plot(tried: Sequence[Tried], chosen: int) -> Tensor:
    """Accuracy, flip rate and change elsewhere over the diffusion time, (1, 400, 720, 3) in 0..1; the chosen step is
    marked."""
    chart = Chart()
    chart.grid([str(round(LAST_TIMESTEP * k / 4)) for k in range(5)], ["0", "0.25", "0.5", "0.75", "1"])
    chart.line([(chosen / LAST_TIMESTEP, 0.0), (chosen / LAST_TIMESTEP, 1.0)], CHOSEN, 3)
    words = [f"step {chosen} (grey)"]
    curves: list[tuple[str, Colour, list[tuple[float, float]]]] = [
        (f"accuracy in {space}", ACCURACY[space], [(each.step, each.accuracy[space]) for each in tried])
        for space in tried[0].accuracy
    ]
    curves.append(("flips (green)", FLIP, [(each.step, each.flip) for each in tried if each.flip is not None]))
    curves.append(
        ("change elsewhere (red)", CHANGE, [(each.step, each.change) for each in tried if each.change is not None])
    )
    for name, colour, points in curves:
        places = [(step / LAST_TIMESTEP, min(value, 1.0)) for step, value in points if math.isfinite(value)]
        chart.line(places, colour, 3)
        for place in places:
            chart.dot(place, colour)
        words += [name] if places else []
    chart.words("    ".join(words), "timestep")
    return chart.picture()
