"""``python -m rg_engine evaluate``: how well the demo heads read and steer, and what their training needs.

Readouts are compared with the world's own truth on scenes that no head has seen; guided pictures are measured on finished
pixels, by estimators that have nothing to do with the head that steered.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..comfy_host.demo_model import Network
from ..comfy_host.loaded.frozen_model import FrozenModel, with_frozen_model
from ..demo.measure import mean_and_error
from ..demo.scores import auc, figure_extent, nearest_places, pck, peaks
from ..errors import ReadoutGuidanceError
from ..guidance import GuidanceSettings
from ..heads import ReadoutHead
from ..training import Reading, TrainingSettings
from ..types import Mode
from .cost.adapters import oft_cost_table
from .demo_heads import Recipe, demo_examples, demo_recipe, recipes_of, train_demo_head
from .demo_world import World, encoded, load_world
from .evidence.blocks import blocks_table, plot_blocks
from .evidence.boundaries import boundaries_table
from .evidence.clip_pair import clip_table
from .evidence.doodl import doodl_cost_table, doodl_table
from .evidence.edits import drags_table, identity_table
from .evidence.oft import oft_table
from .steering import SCENE_SEED, Way, scene_scores, steer

READ_SCENES = 96
TIMES = (0.05, 0.2, 0.4, 0.6, 0.8, 0.95)
PAIRS = (10, 30, 100, 300, 1000)
STEPS_OF_A_TRIAL = 1500
BATCH = 16


def run_evaluation(out: Path, pictures: int, tables: list[str], network: Network = "UNet") -> dict[str, Any]:
    """Measure ``tables`` (all of TABLES unless told) on the demo model with a network, print them, and write them into
    out/evaluation.json, beside older ones."""
    import comfy.utils

    logging.getLogger().setLevel(logging.WARNING)
    comfy.utils.set_progress_bar_enabled(False)
    unknown = [name for name in tables if name not in TABLES]
    if unknown:
        raise ReadoutGuidanceError(f"there is no table {', '.join(unknown)}: choose among {', '.join(TABLES)}")
    out.mkdir(parents=True, exist_ok=True)
    path = out / "evaluation.json"
    report = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    world = load_world(pictures, network)
    for name in tables or [each for each in TABLES if OF_ONE.get(each, network) == network]:
        key = name if network == "UNet" else f"{name}, {network}"
        with torch.inference_mode():
            report[key] = TABLES[name](world)
        if name == "blocks":
            plot_blocks(report[key], out / "blocks.png")
        path.write_text(json.dumps(report, indent=1), encoding="utf-8")
        print(f"\n{key}\n{markdown(report[key])}\n", flush=True)
    return report


def heads_table(world: World) -> list[dict[str, Any]]:
    """What each demo head reads at a fifth of the diffusion time, and what guidance with it does to finished pixels."""
    return [
        {
            "head": recipe.name,
            **_rounded(read_scores(world, world.head(recipe.name), recipe, 0.2)),
            **_rounded(guided_scores(world, recipe)),
        }
        for recipe in recipes_of(world.network)
    ]


def timesteps_table(world: World) -> list[dict[str, Any]]:
    """Each head's main score by the part of the diffusion time."""
    rows = []
    for recipe in recipes_of(world.network):
        scores = [read_scores(world, world.head(recipe.name), recipe, time) for time in TIMES]
        name = next(iter(scores[0]))
        rows.append(
            {"head": recipe.name, "score": name, **{f"{t:g}": round(s[name], 3) for t, s in zip(TIMES, scores, strict=True)}}
        )
    return rows


def pairs_table(world: World) -> list[dict[str, Any]]:
    """A pose head by the number of pairs that it was trained on, all else equal."""
    recipe = demo_recipe("demo_pose")
    rows = []
    for count in PAIRS:
        head = _trial(world, recipe, count)
        rows.append({"pairs": count, **_all_scores(world, recipe, head)})
    return rows


def conventions_table(world: World) -> list[dict[str, Any]]:
    """A pose head trained with the embedding of t, and of 999 - t as the authors'; guidance embeds t either way."""
    recipe = demo_recipe("demo_pose")
    rows = []
    for convention in ("t", "reversed"):
        head = _trial(world, recipe, 100, **({} if convention == "t" else {"timestep_convention": convention}))
        rows.append({"trained with": convention, **_all_scores(world, recipe, head)})
    return rows


def kept_features_table(world: World) -> list[dict[str, Any]]:
    """A pose head of 100 pairs with new noise every step, and with so many noise draws a pair whose features are kept."""
    recipe = demo_recipe("demo_pose")
    rows = []
    for draws in (0, 4, 16):
        head = _trial(world, recipe, 100, **({"noise_draws": draws} if draws else {}))
        rows.append({"noise draws": draws or "new each step", **_rounded(guided_scores(world, recipe, head))})
    return rows


TABLES: dict[str, Callable[[World], list[dict[str, Any]]]] = {
    "heads": heads_table,
    "timesteps": timesteps_table,
    "pairs": pairs_table,
    "conventions": conventions_table,
    "kept_features": kept_features_table,
    "drags": drags_table,
    "identity": identity_table,
    "blocks": blocks_table,
    "clip": clip_table,
    "doodl": doodl_table,
    "doodl_cost": doodl_cost_table,
    "boundaries": boundaries_table,
    "oft": oft_table,
    "oft_cost": oft_cost_table,
}
#: Of a transformer alone, and of a UNet alone.
OF_ONE = {"blocks": "transformer", "conventions": "UNet"}


def read_scores(world: World, head: ReadoutHead, recipe: Recipe, time: float) -> dict[str, float]:
    """How well a head reads unseen scenes noised to ``time``, the main score first."""
    data, scenes = demo_examples(recipe, READ_SCENES, world.vae, SCENE_SEED)
    with torch.inference_mode():
        prompts = encoded(world.clip, [scene.caption() for scene in scenes])
    noise = torch.randn(data.latents.shape, generator=torch.Generator().manual_seed(1))
    rows = data.groups.flatten()

    def read(frozen: FrozenModel) -> list[Reading]:
        return [
            frozen.read(data.latents[part], noise[part], torch.full((len(part),), time), pictures=part).on(
                torch.device("cpu")
            )
            for part in rows.split(BATCH * data.groups.shape[1])
        ]

    readings = with_frozen_model(world.model, prompts, (BATCH, *data.latents.shape[1:]), read)
    with torch.no_grad():
        readout = torch.cat([head.read(r.features, r.emb, data.cells, r.noise_level) for r in readings])
    match recipe.kind:
        case "spatial":
            assert data.truth is not None
            return {"readout rmse": float((readout - data.truth).square().mean().sqrt())}
        case "keypoint":
            seen = [i for i, scene in enumerate(scenes) if scene.figure is not None]
            joints = torch.tensor(np.stack([scenes[i].figure.joints() for i in seen]), dtype=torch.float32)  # type: ignore[union-attr]
            return {
                f"pck@{at}": value
                for at, value in _main_first(pck(peaks(readout[seen]), joints, figure_extent(joints))).items()
            }
        case "lgp":
            assert data.truth is not None
            return {"correlation": float(torch.corrcoef(torch.stack([readout.flatten(), data.truth.flatten()]))[0, 1])}
        case "correspondence":
            assert data.truth is not None
            maps = [torch.cat(layers) for layers in zip(*(r.features for r in readings), strict=True)]
            raw = [F.interpolate(layer, data.cells, mode="bilinear") for layer in maps]
            everything = torch.cat([F.normalize(layer, dim=1) for layer in raw], 1)
            best = max(_matching(layer, data.truth)["0.1"] for layer in [*raw, everything])
            return {
                **{f"pck@{at}": v for at, v in _main_first(_matching(readout, data.truth)).items()},
                "raw features' best pck@0.1": best,
            }
        case "appearance":
            anchor, same, other = readout.unflatten(0, (-1, 3)).unbind(1)
            near, far = (F.cosine_similarity(anchor, maps, dim=1).flatten(1).mean(1) for maps in (same, other))
            return {"auc": auc(near, far)}


def _all_scores(world: World, recipe: Recipe, head: ReadoutHead) -> dict[str, float]:
    return _rounded({**read_scores(world, head, recipe, 0.2), **guided_scores(world, recipe, head)})


def guided_scores(world: World, recipe: Recipe, head: ReadoutHead | None = None) -> dict[str, float]:
    """What guidance with a head does, measured on finished pixels: means of unguided and guided pictures of the same
    seeds, and standard errors."""
    modes: tuple[Mode, ...] = ("fast", "norm_ratio") if recipe.kind == "lgp" else ("fast",)
    if recipe.kind in ("correspondence", "appearance"):
        return {}
    ways = {"unguided": Way()}
    for mode in modes:
        ways[mode] = Way(settings=GuidanceSettings(mode=mode))
    scores: dict[str, list[np.ndarray]] = {}
    with torch.inference_mode():
        for made in steer(world, recipe, head or world.head(recipe.name), ways):
            for name, values in scene_scores(world, recipe, made).items():
                scores.setdefault(f"{made.way} {name}", []).append(values)
    means = {name: mean_and_error(np.concatenate(values)) for name, values in scores.items()}
    return {name: mean for name, (mean, _) in means.items()} | {
        f"{name} se": error for name, (_, error) in means.items() if "pck" not in name
    }


@functools.cache
def _trial(world: World, recipe: Recipe, count: int, **more: Any) -> ReadoutHead:
    """A head trained on ``count`` pairs, as the example workflow trains one; the same one for every table."""
    settings = TrainingSettings(steps=STEPS_OF_A_TRIAL, **more)
    data, scenes = demo_examples(recipe, count, world.vae, 77, figure_only=True)
    return train_demo_head(world.model, world.clip, recipe, data, scenes, settings)


def _matching(maps: Tensor, tracks: Tensor) -> dict[str, float]:
    one, other = maps.unflatten(0, (-1, 2)).unbind(1)
    return pck(nearest_places(one, other, tracks[:, :, 0]), tracks[:, :, 1], 1.0)


def _main_first(scores: dict[str, float]) -> dict[str, float]:
    return {"0.1": scores["0.1"], **scores}


def _rounded(scores: dict[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.3g}") for name, value in scores.items()}


def markdown(rows: list[dict[str, Any]]) -> str:
    """Rows as a table; every column that any row has."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns), *([row.get(name, "") for name in columns] for row in rows)]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
