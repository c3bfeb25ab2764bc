"""``python -m rg_engine evaluate controlnet``: ControlNets and heads that learned from the same pairs, each alone and both
together, measured on finished pixels of unseen scenes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...demo.estimator import joint_positions
from ...demo.measure import mean_and_error
from ...demo.scene_pictures import scene_pictures
from ...demo.world import COLOURS
from ...errors import ReadoutGuidanceError
from ...guidance import GuidanceSettings
from ...heads import ReadoutHead, load_head, save_head
from ...training import TrainingSettings
from ..control.pairs import CONTROLS, Pairs, draw_pairs
from ..control.training import ControlSettings, as_control_net, train_controlnet
from ..cost.operations import count_kept_bytes
from ..cost.timing import model_calls, whole_picture_ratios
from ..demo_heads import Recipe, demo_recipe, train_demo_head
from ..demo_run import contact_sheet
from ..demo_world import World, encoded, with_control
from ..steering import PROMPTS, STEPS, Made, Way, scene_scores, scene_target, steer
from .oft import wall_is

SEED = 77  # of the pairs, as of the other tables' trials
PAIRS = (100, 1000, 20000)
HEAD_STEPS, VALIDATED = 1500, 100
TIMED_PICTURES, TURNS = 4, 3
SHOWN = 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class ControlPlan:
    """work: keeps pairs, checkpoints, what was trained, and the rows that are done. steps: of a ControlNet's training.
    Raises ReadoutGuidanceError for controls that are none."""

    work: Path
    controls: tuple[str, ...] = CONTROLS
    pairs: tuple[int, ...] = PAIRS
    steps: int = 500

    def __post_init__(self) -> None:
        unknown = [name for name in self.controls if name not in CONTROLS]
        if unknown:
            raise ReadoutGuidanceError(f"there is no control {', '.join(unknown)}: choose among {', '.join(CONTROLS)}")
        if min(self.pairs) < 4 or self.steps < 1:
            raise ReadoutGuidanceError(f"pairs {min(self.pairs)}, steps {self.steps}: 4 pairs and a step are the least")


def controlnet_table(world: World, plan: ControlPlan) -> list[dict[str, Any]]:
    """Rows of a control, so many pairs and a way of following it: what was trained and in how many seconds of one core; the
    control error; shares of pictures whose wall and figure have the colours of the prompt; the time of a picture over an
    unguided one's; weights, and what is kept for backward in a step of one picture."""
    if world.network != "UNet":
        raise ReadoutGuidanceError("ControlNets are trained for the demo model's UNet only: leave --network out")
    plan.work.mkdir(parents=True, exist_ok=True)
    rows = [row for control in plan.controls for count in plan.pairs for row in _rows(world, plan, control, count)]
    unguided = {row["control"]: row for row in reversed(rows) if row["way"] == "unguided"}  # the same for any pairs
    return [row for row in rows if row["way"] != "unguided" or row is unguided[row["control"]]]


def _rows(world: World, plan: ControlPlan, control: str, count: int) -> list[dict[str, Any]]:
    """Of one control and so many pairs; they are kept in the work folder."""
    name = f"{control}_{count}"
    done = plan.work / f"{name}_{plan.steps}steps_{world.pictures}pictures.json"
    if done.exists():
        return json.loads(done.read_text(encoding="utf-8"))
    recipe = demo_recipe(f"demo_{control}")
    pairs = draw_pairs(plan.work / "pairs", control, count, world.vae, SEED)
    network_path, head_path = plan.work / f"controlnet_{name}.safetensors", plan.work / f"head_{name}.safetensors"
    with _clock(network_path.with_suffix(".state")):
        network = train_controlnet(pairs, world.clip, ControlSettings(steps=plan.steps), network_path)
    with _clock(head_path.with_suffix(".state")):
        head = _head(world, recipe, pairs, head_path)
    control_net = as_control_net(network)
    costs = _costs(world, plan.work / "costs.json", recipe, head, control_net)
    fast = GuidanceSettings()
    ways = {
        "unguided": Way(steps=STEPS), "head": Way(steps=STEPS, settings=fast),
        "ControlNet": Way(steps=STEPS, control_net=control_net),
        "both": Way(steps=STEPS, settings=fast, control_net=control_net),
    }  # fmt: skip
    trained = {"head": (head.network, seconds_of(head_path)), "ControlNet": (network, seconds_of(network_path))}
    found: dict[str, list[dict[str, np.ndarray]]] = {way: [] for way in ways}
    sheet: dict[str, Tensor] = {}
    for made in steer(world, recipe, head, ways):
        found[made.way].append(scores(world, recipe, made))
        sheet.setdefault("target", getattr(made.wanted, control))
        sheet.setdefault(made.way, made.pictures)
    rows = [
        {
            "control": control, "pairs": "" if way == "unguided" else count, "way": way, **_summed(scored),
            **_sizes([trained[name] for name in trained if way in (name, "both")]), **costs[way],
        } for way, scored in found.items()
    ]  # fmt: skip
    contact_sheet([list(sheet.items())], SHOWN).save(plan.work / f"controlnet_{name}.jpg", quality=88)
    done.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    print("\n".join(map(str, rows)), flush=True)
    return rows


def _head(world: World, recipe: Recipe, pairs: Pairs, path: Path) -> ReadoutHead:
    """A head of these pairs, trained as the example workflow trains one; read from ``path`` if it is there."""
    if not path.exists():
        settings = TrainingSettings(steps=HEAD_STEPS, validation_share=min(0.1, VALIDATED / len(pairs)))
        with torch.inference_mode(False):
            head = train_demo_head(
                world.model, world.clip, recipe, pairs.examples(), pairs.scenes, settings,
                checkpoint=path.with_suffix(".state"),
            )  # fmt: skip
        save_head(head, path)
    return load_head(path)


def scores(world: World, recipe: Recipe, made: Made) -> dict[str, np.ndarray]:
    """(B,) each: the control error, and whether wall and figure have the colours that the prompt asks for."""
    figure, wall = made.prompt.split()[1], made.prompt.split()[-2]
    return {
        "error": scene_scores(world, recipe, made)["error"], "wall": wall_is(made.pictures, wall).numpy(),
        "figure": figure_is(world, made.pictures, figure).numpy(),
    }  # fmt: skip


def figure_is(world: World, pictures: Tensor, colour: str) -> Tensor:
    """Whether the figure's head, where the estimator finds it, is nearest to a colour, (N,)."""
    heads = joint_positions(world.estimator(pictures.permute(0, 3, 1, 2).float() * 2 - 1)[0])[:, 0]  # (N, 2)
    size, colours = pictures.shape[1], torch.tensor(list(COLOURS.values()), dtype=torch.float32)
    seen = []
    for picture, place in zip(pictures, heads, strict=True):
        x, y = (place * size).long().clamp(2, size - 3).tolist()
        seen.append(picture[y - 2 : y + 3, x - 2 : x + 3].flatten(0, 1).median(0).values * 255)
    return (torch.cdist(torch.stack(seen), colours).argmin(1) == list(COLOURS).index(colour)).float()


def _summed(found: list[dict[str, np.ndarray]]) -> dict[str, float]:
    error, deviation = mean_and_error(np.concatenate([each["error"] for each in found]))
    colours = {name: round(float(np.concatenate([each[name] for each in found]).mean()), 2) for name in ("wall", "figure")}
    return {"error": float(f"{error:.3g}"), "se": float(f"{deviation:.2g}"), **colours}


def _sizes(used: list[tuple[nn.Module, float]]) -> dict[str, float]:
    """Of networks and the seconds of their training."""
    numbers = [p for network, _ in used for p in network.parameters()]
    return {
        "parameters": sum(p.numel() for p in numbers), "training, s": round(sum(seconds for _, seconds in used)),
        "MiB, weights": round(sum(p.nbytes for p in numbers) / 2**20, 1),
    }  # fmt: skip


def _costs(
    world: World, path: Path, recipe: Recipe, head: ReadoutHead, control_net: Any
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Of each way: the time of a picture over an unguided one's, and what is kept for backward of one picture. They are the
    same whatever was learned, so they are measured once, and read from ``path`` then."""
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    wanted = scene_pictures(SEED, TIMED_PICTURES, figure_only=True)
    target = scene_target(world, recipe, head, wanted)
    plain = encoded(world.clip, [PROMPTS[0]]), encoded(world.clip, [""])
    controlled = with_control(*plain, control_net, getattr(wanted, recipe.layer))
    ways = {
        "unguided": (None, plain), "head": (target, plain), "ControlNet": (None, controlled), "both": (target, controlled)
    }  # fmt: skip
    settings, latent = GuidanceSettings(), torch.zeros(TIMED_PICTURES, 8, 16, 16)
    ratios = whole_picture_ratios(world.model, ways, settings, latent, steps=STEPS, turns=TURNS)
    one = scene_target(world, recipe, head, scene_pictures(SEED, 1, figure_only=True))
    with count_kept_bytes(*world.model.model.diffusion_model.parameters(), *head.network.parameters()) as kept:
        model_calls(world.model, one, settings, plain, latent[:1], steps=STEPS)
    mib = round(kept[0] / 2**20, 1)
    costs = {way: {"MiB, kept": mib if ways[way][0] else 0, "a picture": ratio} for way, ratio in ratios.items()}
    path.write_text(json.dumps(costs, indent=1), encoding="utf-8")
    return costs


@contextlib.contextmanager
def _clock(checkpoint: Path) -> Iterator[None]:
    """Adds this process's seconds to those that a training took before; none if its checkpoint stays as it is."""
    began, before = time.process_time(), seconds_of(checkpoint)
    was = _written(checkpoint)
    try:
        yield
    finally:
        if _written(checkpoint) != was:
            checkpoint.with_suffix(".seconds").write_text(f"{before + time.process_time() - began:.1f}", encoding="utf-8")


def _written(path: Path) -> float | None:
    return path.stat().st_mtime if path.exists() else None


def seconds_of(trained: Path) -> float:
    """How long its training took, in seconds of this process's threads."""
    path = trained.with_suffix(".seconds")
    return float(path.read_text(encoding="utf-8")) if path.exists() else 0.0
