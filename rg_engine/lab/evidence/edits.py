"""The tables of ``evaluate`` on drags and identities, measured on finished pixels."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...comfy_host.edits.inversion import invert_latent
from ...demo.estimator import joint_positions
from ...demo.render import pose_map, render
from ...demo.scene_pictures import sample_scenes
from ...demo.world import COLOURS, JOINTS, Scene
from ...guidance import GuidanceSettings, Target
from ...types import Drag
from ..demo_world import World, encoded, sample

DRAG_SEED = 6007
#: What is dragged, and how far guidance goes for it (the sampler's strength).
MOVES = {"figure": 2.0, "arm": 1.5}
#: How the drag workflows are set: the appearance target's weight beside the correspondence target's 1, and until when they
#: guide.
APPEARANCE_WEIGHT, END_PERCENT = 0.002, 0.8
INVERSION_STEPS = 50
HELD = ("head", "right wrist", "left wrist", "right hip", "left hip", "right ankle", "left ankle")  # when an arm moves
FIGURE_ARROWS = ("head", "neck", "right wrist", "left wrist", "right hip", "left hip", "right ankle", "left ankle")
STEPS = 30
SEEN_BESIDE = 0.12  # of the picture
#: How far the world's figures raise their arms: angles from hanging down, radians, to the right of the picture.
UPPER_ARM = {"right": (-2.7, 0.3), "left": (-0.3, 2.7)}
#: How the identity workflow is set.
IDENTITY_END, IDENTITY_STRENGTH, IDENTITY_WEIGHT = 1.0, 4.0, 0.1
SAME = 0.12  # colours nearer than this are one


@dataclasses.dataclass(frozen=True, kw_only=True)
class DragTask:
    """What is dragged in a picture: drags, those of the joints that are measured first, and these joints' numbers."""

    drags: tuple[Drag, ...]
    joints: tuple[int, ...]


def drag_tasks(joints: Tensor, move: str, rng: np.random.Generator) -> DragTask | None:
    """Drags for a picture whose joints (14, 2) are known; None where there is no room for the move."""
    places = joints.double().numpy()
    if move == "figure":
        numbers = tuple(JOINTS.index(name) for name in FIGURE_ARROWS)
        left, right = 0.05 - places[:, 0].min(), 0.95 - places[:, 0].max()
        choices = [shift for shift in (-0.2, 0.2) if left <= shift <= right]
        if not choices:
            return None
        shift = np.array([choices[int(rng.integers(len(choices)))], 0.0])
        return _task({k: places[k] + shift for k in numbers}, places)
    side = max(("right", "left"), key=lambda side: _beside_body(places[JOINTS.index(f"{side} wrist")], places))
    shoulder, elbow, wrist = (JOINTS.index(f"{side} {name}") for name in ("shoulder", "elbow", "wrist"))
    for angle in rng.permutation([-1.2, -0.9, 0.9, 1.2]):
        turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        goals = {k: places[shoulder] + turn @ (places[k] - places[shoulder]) for k in (elbow, wrist)}
        seen = all(_beside_body(point, places) > SEEN_BESIDE for point in (places[wrist], goals[wrist]))
        dx, dy = goals[elbow] - places[shoulder]
        low, high = UPPER_ARM[side]
        inside = all(0.04 < v < 0.96 for goal in goals.values() for v in goal)
        if seen and inside and low < math.atan2(dx, dy) < high and np.linalg.norm(goals[wrist] - places[wrist]) > 0.1:
            middles = [(group[elbow] + group[wrist]) / 2 for group in (places, goals)]
            held = [JOINTS.index(name) for name in HELD if not name.startswith(f"{side} w")]
            anchors = [Drag(_inside(places[k]), _inside(places[k])) for k in held]
            return _task(goals, places, Drag(_inside(middles[0]), _inside(middles[1])), *anchors)
    return None


def _beside_body(point: np.ndarray, places: np.ndarray) -> float:
    """How far a point is from the line from head to hips: an arm before the body can't be seen, nor dragged."""
    head, hips = places[0], (places[8] + places[11]) / 2
    along = np.clip(np.dot(point - head, hips - head) / max(float(np.dot(hips - head, hips - head)), 1e-6), 0, 1)
    return float(np.linalg.norm(point - head - along * (hips - head)))


def drags_table(world: World) -> list[dict[str, Any]]:
    """Drags of the whole figure and of an arm, in generated and in inverted pictures.

    distance: of the dragged joints to their goals, in pixels, before and after. elsewhere: mean difference of the pixels
    outside of what moved from the source, of the dragged picture and of one of another seed.
    """
    rows = []
    for source in ("generated", "inverted"):
        for move in MOVES:
            rows.append({"pictures": source, "move": move, **_measure_drags(world, source, move)})
    return rows


def _measure_drags(world: World, source: str, move: str) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    done, number = 0, 0
    scenes = sample_scenes(DRAG_SEED, 4 * world.pictures, figure_only=True)
    while done < world.pictures and number < len(scenes):
        scene, seed = scenes[number], 900 + number
        rng = np.random.default_rng([DRAG_SEED, number])
        number += 1
        start: dict[str, Any] = {"samples": torch.zeros(1, 4, 16, 16)}
        sampling: dict[str, Any] = {"prompt": scene.caption(), "seed": seed, "steps": STEPS}
        if source == "inverted":
            picture = torch.from_numpy(render(scene).image / np.float32(255))[None]
            prompt = encoded(world.clip, [scene.caption()])
            latent = {"samples": world.vae.encode(picture)}
            start, error = invert_latent(world.model, latent, steps=INVERSION_STEPS, scheduler="normal", positive=prompt)
            sampling |= {"steps": INVERSION_STEPS, "cfg": 1.0, "sampler_name": "euler"}
        before = sample(world, None, start, **sampling)
        joints = _joints(world, before)
        task = drag_tasks(joints, move, rng)
        if task is None:
            continue
        region = _moved_region(task)
        settings = GuidanceSettings(strength=MOVES[move])
        after = sample(world, drag_target(world, task.drags), start, settings, **sampling)
        goals = torch.tensor([drag.end for drag in task.drags[: len(task.joints)]])
        kept = ~region
        other = sample(world, None, {"samples": torch.zeros(1, 4, 16, 16)}, **{**sampling, "seed": seed + 5000})
        values = {
            "distance before": _distance_px(joints[list(task.joints)], goals),
            "distance after": _distance_px(_joints(world, after)[list(task.joints)], goals),
            "elsewhere": float((after - before)[0].abs().mean(-1)[kept].mean()),
            "elsewhere, another seed": float((other - before)[0].abs().mean(-1)[kept].mean()),
        }
        if source == "inverted":
            values["inversion error"] = error
        for name, value in values.items():
            found.setdefault(name, []).append(value)
        done += 1
    return {"drags": done, **{name: float(f"{np.mean(each):.3g}") for name, each in found.items()}}


def drag_target(world: World, drags: tuple[Drag, ...]) -> Target:
    """What the drag workflows chain: a correspondence and an appearance target."""
    look = Target(head=world.head("demo_appearance"), weight=APPEARANCE_WEIGHT, end_percent=END_PERCENT)
    return Target(head=world.head("demo_correspondence"), end_percent=END_PERCENT, drags=drags, previous=look)


def identity_table(world: World) -> list[dict[str, Any]]:
    """A figure of a picture, in another pose elsewhere: how far its colours are from the reference's.

    All pictures follow the pose; the guided ones the reference's figure as well. The prompt is empty, so that nothing else
    says who it is.
    """
    scenes = sample_scenes(DRAG_SEED + 1, world.pictures, figure_only=True)
    others = sample_scenes(DRAG_SEED + 2, world.pictures, figure_only=True)
    found: dict[str, list[float]] = {"unguided": [], "guided": []}
    for number, (scene, other) in enumerate(zip(scenes, others, strict=True)):
        start = {"samples": torch.zeros(1, 4, 16, 16)}
        sampling: dict[str, Any] = {"prompt": "", "cfg": 1.0, "seed": 300 + number, "steps": STEPS}
        for name in found:
            target = identity_target(world, scene, other, IDENTITY_WEIGHT if name == "guided" else 0.0)
            settings = GuidanceSettings(strength=IDENTITY_STRENGTH if name == "guided" else 1.0)
            made = sample(world, target, start, settings, **sampling)
            found[name].append(colour_distance(world, made, scene))
    rows = []
    for name, each in found.items():
        scores = {"mean distance": np.mean(each), "5th percentile": np.percentile(each, 5), "median": np.median(each)}
        same = float(np.mean(np.array(each) < SAME))
        rows.append({"pictures": name, **{key: float(f"{v:.3g}") for key, v in scores.items()}, "same colours": same})
    return rows


def identity_target(world: World, scene: Scene, other: Scene, weight: float) -> Target:
    """What the identity workflow chains: the pose of ``other``'s figure and, where it is, the look of ``scene``'s."""
    seen, wanted = render(scene), render(other)
    pose = torch.from_numpy(pose_map(other.figure) / np.float32(255))[None]
    return Target(
        head=world.head("demo_appearance"),
        weight=weight,
        end_percent=IDENTITY_END,
        reference_latent=world.vae.encode(torch.from_numpy(seen.image / np.float32(255))[None]),
        reference_mask=torch.from_numpy(seen.figure_mask)[None].float(),
        mask=torch.from_numpy(wanted.figure_mask)[None].float(),
        previous=Target(head=world.head("demo_pose"), image=pose),
    )


def colour_distance(world: World, picture: Tensor, scene: Scene) -> float:
    """How far a figure's colours (head and shirt, where the estimator finds them) are from an identity's: RMS of RGB,
    0..1."""
    joints = _joints(world, picture)
    places = {"colour": joints[0], "shirt": joints[[1, 8, 11]].mean(0)}
    size = picture.shape[1]
    errors = []
    assert scene.figure is not None
    for part, place in places.items():
        x, y = (place * size).long().clamp(2, size - 3).tolist()
        seen = picture[0, y - 2 : y + 3, x - 2 : x + 3].flatten(0, 1).median(0).values
        wanted = torch.tensor(COLOURS[getattr(scene.figure.identity, part)]) / 255
        errors.append((seen - wanted).square().mean())
    return float(torch.stack(errors).mean().sqrt())


def _task(goals: dict[int, np.ndarray], places: np.ndarray, *more: Drag) -> DragTask:
    drags = [Drag(_inside(places[k]), _inside(goal)) for k, goal in goals.items()]
    return DragTask(drags=(*drags, *more), joints=tuple(goals))


def _inside(place: np.ndarray) -> tuple[float, float]:
    x, y = np.clip(place, 0, 1)
    return float(x), float(y)


def _joints(world: World, picture: Tensor) -> Tensor:
    heatmaps, _ = world.estimator(picture.permute(0, 3, 1, 2).float() * 2 - 1)
    return joint_positions(heatmaps)[0]


def _distance_px(found: Tensor, goals: Tensor, size_px: int = 128) -> float:
    return float((found - goals).norm(dim=-1).mean() * size_px)


def _moved_region(task: DragTask, size_px: int = 128, margin: float = 0.08) -> Tensor:
    """Where the dragged joints were, go, and what lies between, (H, W)."""
    region = torch.zeros(size_px, size_px, dtype=torch.bool)
    points = torch.tensor([point for drag in task.drags[: len(task.joints)] for point in (drag.start, drag.end)])
    low, high = points.amin(0) - margin, points.amax(0) + margin
    (x0, y0), (x1, y1) = ((v * size_px).long().clamp(0, size_px).tolist() for v in (low, high))
    region[y0:y1, x0:x1] = True
    return region
