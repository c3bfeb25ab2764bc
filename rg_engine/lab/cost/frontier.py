"""What control costs on the demo model: control error on finished pixels against the time of whole pictures."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from ...demo.measure import mean_and_error
from ...guidance import GuidanceSettings
from ..demo_heads import demo_recipe
from ..demo_world import World, demo_head
from ..steering import STEPS, Way, scene_scores, steer

HEADS = ("demo_pose", "demo_depth", "demo_edges", "demo_keypoints", "demo_sketch")
#: Ways of guiding, all with STEPS steps; with those of STEP_COUNTS the default is measured as well.
GRADIENT_ALONE = GuidanceSettings(feature_steps=1, keep_negative=0)
WAYS = {
    "fast, each 0.25": GuidanceSettings(interval=0.25),
    "fast (default)": GuidanceSettings(),
    "fast, 2 iterations": GuidanceSettings(iterations=2),
    "fast, each step": GuidanceSettings(iterations=4),
    "gradient alone, each 0.25": dataclasses.replace(GRADIENT_ALONE, interval=0.25),
    "gradient alone": GRADIENT_ALONE,
    "gradient alone, 2 iterations": dataclasses.replace(GRADIENT_ALONE, iterations=2),
    "gradient alone, each step": dataclasses.replace(GRADIENT_ALONE, iterations=4),
    "reference": GuidanceSettings(mode="reference"),
    "reference, 3 updates": GuidanceSettings(mode="reference", iterations=3),
    "norm_ratio": GuidanceSettings(mode="norm_ratio"),
}
STEP_COUNTS = (8, 20, 50)
COLOURS = dict(zip(HEADS, [(204, 76, 60), (52, 110, 190), (50, 150, 90), (150, 90, 190), (200, 140, 40)], strict=True))


@torch.inference_mode()
def measure_frontier(world: World, settings: dict[str, GuidanceSettings] | None = None) -> list[dict[str, Any]]:
    """Rows of head, way, steps, error (of a sketch 1 - IoU), its standard error, and the time of a picture over that of an
    unguided one (of a head's batches the medians, of the heads' ratios the median: what is read hardly matters)."""
    ways = {"unguided": Way()} | {name: Way(settings=each) for name, each in (settings or WAYS).items()}
    for steps in STEP_COUNTS:
        ways |= {f"unguided, {steps} steps": Way(steps=steps)}
        ways |= {f"fast (default), {steps} steps": Way(settings=GuidanceSettings(), steps=steps)}
    rows = []
    for head in HEADS:
        recipe = demo_recipe(head)
        errors: dict[str, list[np.ndarray]] = {name: [] for name in ways}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for made in steer(world, recipe, demo_head(head), ways):
            scores = scene_scores(world, recipe, made)
            errors[made.way].append(1 - scores["iou"] if "iou" in scores else scores["error"])
            seconds[made.way].append(made.seconds / len(made.pictures))
        plain = {way.steps: np.median(seconds[name]) for name, way in ways.items() if way.settings is None}
        for name, way in ways.items():
            mean, deviation = mean_and_error(np.concatenate(errors[name]))
            ratio = round(float(np.median(seconds[name]) / plain[way.steps]), 3)
            numbers = {"error": float(f"{mean:.3g}"), "standard error": float(f"{deviation:.2g}"), "picture": ratio}
            rows.append({"head": head, "way": name, "steps": way.steps, **numbers})
    for name in ways:
        same = [row for row in rows if row["way"] == name]
        ratio = round(float(np.median([row["picture"] for row in same])), 3)
        for row in same:
            row["picture"] = ratio
    return rows


def plot_frontier(rows: list[dict[str, Any]], path: Path) -> None:
    """Errors over the unguided ones', by the time of a picture (logarithmic), 30 steps: a dot a head, a cross their mean."""
    shown = [row for row in rows if row["steps"] == STEPS and row["way"] != "unguided"]
    unguided = {row["head"]: row["error"] for row in rows if row["way"] == "unguided"}
    ways = sorted({row["way"]: row["picture"] for row in shown}.items(), key=lambda way: way[1])
    longest = max(1.01, *(row["picture"] for row in shown))
    highest = 1.1 * max(row["error"] / unguided[row["head"]] for row in shown)
    left, top, width, height = 60, 40, 700, 370
    image = Image.new("RGB", (left + width + 130, top + height + 40), "white")
    pen = ImageDraw.Draw(image)

    def place(ratio: float, share: float) -> tuple[float, float]:
        return left + width * math.log(max(ratio, 1.0)) / math.log(longest), top + height * (1 - share / highest)

    for k in range(6):
        x, y = left + width * k / 5, top + height * k / 5
        pen.line((left, y, left + width, y), fill=(232, 232, 232))
        pen.text((20, y - 6), f"{highest * (1 - k / 5):.2f}", fill=(90, 90, 90))
        pen.text((x - 12, top + height + 8), f"{longest ** (k / 5):.2f}x", fill=(90, 90, 90))
    for number, (way, _) in enumerate(ways):
        found = [row for row in shown if row["way"] == way]
        shares = [row["error"] / unguided[row["head"]] for row in found]
        for row, share in zip(found, shares, strict=True):
            x, y = place(row["picture"], share)
            pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=COLOURS[row["head"]])
        x, y = place(found[0]["picture"], float(np.mean(shares)))
        pen.line((x - 5, y - 5, x + 5, y + 5), fill="black", width=2)
        pen.line((x - 5, y + 5, x + 5, y - 5), fill="black", width=2)
        pen.text((x + 8, y - (-6 if number % 2 else 18)), way, fill="black")
    for k, (head, colour) in enumerate(COLOURS.items()):
        pen.text((left + 90 * k, 12), head.removeprefix("demo_"), fill=colour)
    pen.text((left + 450, 12), "x: their mean", fill="black")
    image.save(path)
