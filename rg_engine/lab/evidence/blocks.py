"""Which block of a transformer a head should read: how well it steers from each, and what a guided step then costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...chart import Chart
from ...comfy_host.loaded.gradient_scope import GradientScope
from ...comfy_host.loaded.model import backbone_of
from ...comfy_host.loaded.saved_tensors import beside_other_nodes
from ...demo.measure import mean_and_error
from ...demo.text import MAX_TOKENS, WIDTH
from ...features import Backbone, FeatureTap
from ...guidance import GuidanceSettings
from ...training import TrainingSettings
from ..cost.operations import Operations
from ..demo_heads import demo_examples, demo_recipe, train_demo_head
from ..demo_world import World
from ..steering import Way, scene_scores, steer

EXAMPLES, STEPS = 1000, 600
LINE, DOTS = (40, 90, 180), (200, 60, 40)


def blocks_table(world: World) -> list[dict[str, Any]]:
    """A pose head by the block that it reads, all else equal: the error of finished pictures, unguided and guided, and the
    operations of a guided step of one prompt over a plain one's."""
    recipe = demo_recipe("demo_pose")
    data, scenes = demo_examples(recipe, EXAMPLES, world.vae, 77, figure_only=True)
    backbone = backbone_of(world.model)
    settings = TrainingSettings(steps=STEPS, batch=recipe.batch, shift=recipe.shift)
    rows: list[dict[str, Any]] = []
    for tap in backbone.available:
        head = train_demo_head(world.model, world.clip, recipe, data, scenes, settings, block=tap.path)
        found: dict[str, list[np.ndarray]] = {}
        ways = {"guided": Way(settings=GuidanceSettings())} | ({} if rows else {"unguided": Way()})
        with torch.inference_mode():
            for made in steer(world, recipe, head, ways):
                found.setdefault(made.way, []).append(scene_scores(world, recipe, made)["error"])
        scores = {way: mean_and_error(np.concatenate(values)) for way, values in found.items()}
        unguided = scores["unguided"][0] if "unguided" in scores else rows[0]["unguided error"]
        rows.append(
            {
                "block": tap.path, "step": round(step_cost(world, backbone.at([tap.path])), 2),
                "unguided error": round(unguided, 2), "guided error": round(scores["guided"][0], 2),
                "se": round(scores["guided"][1], 2),
            }
        )  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def step_cost(world: World, backbone: Backbone) -> float:
    """Operations (products, convolutions) of a guided step of one prompt over a plain one's."""
    network = world.model.model.diffusion_model
    with torch.inference_mode(False):
        x, sigma, words = torch.randn(1, 8, 16, 16), torch.full((1,), 0.5), torch.randn(1, MAX_TOKENS, WIDTH)
    scope = GradientScope(network, "full", backbone)
    with scope, torch.no_grad(), Operations() as plain:
        network(x, sigma, context=words, num_tokens=MAX_TOKENS)
    with scope, beside_other_nodes(), FeatureTap(network, backbone) as tap, Operations() as guided:
        leaf = x.clone().requires_grad_()
        network(leaf, sigma, context=words, num_tokens=MAX_TOKENS)
        maps, _ = tap.take()
        torch.autograd.grad(maps, leaf, [torch.ones_like(map_) for map_ in maps])
    return guided.count / plain.count


def plot_blocks(rows: list[dict[str, Any]], path: Path) -> None:
    """The guided error over the unguided one, by what a guided step costs; a dot a block, in the order in which they run."""
    chart, most = Chart(), max(row["step"] for row in rows)
    top = 1.1 * max(row["guided error"] / row["unguided error"] for row in rows)
    points = [
        ((row["step"] - 1) / (most - 1), row["guided error"] / row["unguided error"] / top) for row in rows
    ]  # fmt: skip
    chart.grid([f"{1 + (most - 1) * k / 4:.2f}" for k in range(5)], [f"{top * k / 5:.2f}" for k in range(6)])
    chart.line(points, LINE, 2)
    for point in points:
        chart.dot(point, DOTS)
    chart.words(
        f"pose error over the unguided one, read at {rows[0]['block']} to {rows[-1]['block']}", "cost of a guided step"
    )
    chart.save(path)
