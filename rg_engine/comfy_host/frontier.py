"""What control costs on the demo model: control error on finished pixels against the time of whole pictures."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from ..demo.measure import control_errors, mean_and_error
from ..demo.scene_pictures import scene_pictures
from ..guidance import GuidanceSettings, Target
from .demo_world import World, demo_head, sample
from .evaluate import PROMPTS, SCENE_SEED

CONTROLS = ("pose", "depth", "edges")
#: Ways of guiding, all with 30 steps; with those of STEP_COUNTS the default is measured as well.
WAYS = {
    "fast, every step": GuidanceSettings(interval=0.0),
    "fast, each 0.05": GuidanceSettings(interval=0.05),
    "fast (default)": GuidanceSettings(),
    "fast, each 0.17": GuidanceSettings(interval=0.17),
    "fast, each 0.25": GuidanceSettings(interval=0.25),
    "reference": GuidanceSettings(mode="reference"),
    "reference, 3 updates": GuidanceSettings(mode="reference", iterations=3),
    "norm_ratio": GuidanceSettings(mode="norm_ratio"),
}
STEP_COUNTS = (8, 20, 50)
BATCH = 8
COLOURS = {"pose": (204, 76, 60), "depth": (52, 110, 190), "edges": (50, 150, 90)}


@dataclasses.dataclass
class _Tally:
    errors: list[np.ndarray] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)


@torch.inference_mode()
def measure_frontier(world: World, ways: dict[str, GuidanceSettings] | None = None) -> list[dict[str, Any]]:
    """Rows of control, way, steps, error, its standard error, and the time of a picture over that of an unguided one.

    Every way makes the same pictures, batch by batch, one way after another; of the times the medians are compared.
    """
    plans = [(name, 30, settings) for name, settings in (ways or WAYS).items()]
    plans += [("fast (default)", steps, GuidanceSettings()) for steps in STEP_COUNTS]
    rows = []
    for control in CONTROLS:
        head = demo_head(f"demo_{control}")
        tallies: dict[tuple[str, int], _Tally] = {}
        for first in range(0, world.pictures, BATCH):
            drawn = scene_pictures(SCENE_SEED + 1 + first, min(BATCH, world.pictures - first), figure_only=True)
            target = Target(head=head, image=getattr(drawn, control))
            for name, steps, settings in _with_unguided(plans):
                start = {"samples": torch.zeros(len(drawn.scenes), 4, 16, 16)}
                prompt = PROMPTS[first // BATCH % len(PROMPTS)]
                began = time.perf_counter()
                made = sample(
                    world, target if settings else None, start, settings, prompt=prompt, seed=100 + first, steps=steps
                )  # fmt: skip
                tally = tallies.setdefault((name, steps), _Tally())
                tally.seconds.append((time.perf_counter() - began) / len(made))
                tally.errors.append(control_errors(control, made, drawn.scenes, world.estimator))
        for (name, steps), tally in tallies.items():
            mean, deviation = mean_and_error(np.concatenate(tally.errors))
            plain = float(np.median(tallies["unguided", steps].seconds))
            rows.append(
                {
                    "control": control, "way": name, "steps": steps, "error": float(f"{mean:.3g}"),
                    "standard error": float(f"{deviation:.2g}"),
                    "picture": round(float(np.median(tally.seconds)) / plain, 3),
                }
            )  # fmt: skip
    return rows


def plot_frontier(rows: list[dict[str, Any]], path: Path) -> None:
    """Error, as a part of the unguided one's, over the time of a picture; one line a control, 30 steps."""
    image = Image.new("RGB", (860, 460), "white")
    pen = ImageDraw.Draw(image)
    left, top, width, height = 60, 34, 760, 370
    shown = [row for row in rows if row["steps"] == 30 and row["way"] != "unguided"]
    unguided = {row["control"]: row["error"] for row in rows if row["way"] == "unguided" and row["steps"] == 30}
    last = max(row["picture"] for row in shown)
    most = max(row["error"] / unguided[row["control"]] for row in shown)

    def place(row: dict[str, Any]) -> tuple[float, float]:
        share = row["error"] / unguided[row["control"]]
        across = np.log(max(row["picture"], 1.0)) / np.log(max(last, 1.01))
        return left + width * float(across), top + height * (1 - share / (1.1 * most))

    for k in range(6):
        y = top + height * k / 5
        pen.line((left, y, left + width, y), fill=(232, 232, 232))
        pen.text((14, y - 6), f"{1.1 * most * (1 - k / 5):.2f}", fill=(90, 90, 90))
        x = left + width * k / 5
        pen.text((x - 10, top + height + 8), f"{last ** (k / 5):.2f}x", fill=(90, 90, 90))
    for control, colour in COLOURS.items():
        for row in (row for row in shown if row["control"] == control):
            x, y = place(row)
            pen.ellipse((x - 4, y - 4, x + 4, y + 4), fill=colour)
            pen.text((x + 7, y - 6), row["way"] if control == "pose" else "", fill=(60, 60, 60))
    for k, (control, colour) in enumerate(COLOURS.items()):
        pen.text((left + 90 * k, 10), control, fill=colour)
    pen.text(
        (left + 290, 10), "control error over the unguided one's, by the time of a picture (unguided: 1x)", fill=(60, 60, 60)
    )
    image.save(path)


def _with_unguided(
    plans: list[tuple[str, int, GuidanceSettings]],
) -> Iterator[tuple[str, int, GuidanceSettings | None]]:
    for steps in dict.fromkeys(steps for _, steps, _ in plans):
        yield "unguided", steps, None
    yield from plans
