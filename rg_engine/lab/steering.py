"""Pictures of the demo model that follow scenes, made in several ways, and how well they do: what figures are taken over."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..demo.estimator import joint_positions
from ..demo.measure import control_errors
from ..demo.scene_pictures import ScenePictures, scene_pictures
from ..demo.scores import figure_extent, pck, sketch_iou
from ..guidance import GuidanceSettings, Target
from ..heads import ReadoutHead
from .demo_heads import Recipe
from .demo_world import World, sample

SCENE_SEED = 4051  # of scenes that no head has seen
PROMPTS = ("a red figure, grey wall", "a blue figure, cream wall", "a green figure, pink wall", "a yellow figure, teal wall")
BATCH = 16
STEPS = 30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Way:
    """How pictures are made; without settings they are not guided. control_net: follows the same pictures as the head."""

    settings: GuidanceSettings | None = None
    control_net: Any = None
    steps: int = STEPS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Made:
    """Finished pictures (B, 128, 128, 3) in 0..1, made in the way ``way`` under a prompt; what they should follow; the time
    they took."""

    way: str
    prompt: str
    pictures: Tensor
    wanted: ScenePictures
    seconds: float


def steer(
    world: World, recipe: Recipe, head: ReadoutHead, ways: dict[str, Way],
    target_of: Callable[[World, Recipe, ReadoutHead, ScenePictures], Target] | None = None,
) -> Iterator[Made]:  # fmt: skip
    """``world.pictures`` pictures in each way, of the same scenes, prompts and seeds: batch by batch, way after way.
    target_of: what is followed, :func:`scene_target` unless told."""
    for first in range(0, world.pictures, BATCH):
        wanted = scene_pictures(SCENE_SEED + 1 + first, min(BATCH, world.pictures - first), figure_only=True)
        target = (target_of or scene_target)(world, recipe, head, wanted)
        prompt = PROMPTS[first // BATCH % len(PROMPTS)]
        for name, way in ways.items():
            start = {"samples": torch.zeros(len(wanted.scenes), 4, 16, 16)}
            control = (way.control_net, getattr(wanted, recipe.layer)) if way.control_net is not None else None
            began = time.perf_counter()
            pictures = sample(
                world, target if way.settings else None, start, way.settings,
                prompt=prompt, seed=100 + first, steps=way.steps, control=control,
            )  # fmt: skip
            yield Made(way=name, prompt=prompt, pictures=pictures, wanted=wanted, seconds=time.perf_counter() - began)


def scene_target(world: World, recipe: Recipe, head: ReadoutHead, wanted: ScenePictures) -> Target:
    """What a head of the recipe's kind follows, of scenes."""
    if recipe.kind == "keypoint":
        return Target(head=head, readout=wanted.keypoints)
    if recipe.kind == "lgp":
        return Target(head=head, reference_latent=world.vae.encode(wanted.edges))
    return Target(head=head, image=getattr(wanted, recipe.layer))


def scene_scores(world: World, recipe: Recipe, made: Made) -> dict[str, np.ndarray]:
    """How well each picture follows its scene, (B,) each: error; PCK of joints as well; the IoU of a sketch."""
    if recipe.kind == "lgp":
        pairs = zip(made.pictures, made.wanted.edges, strict=True)
        return {"iou": np.array([sketch_iou(picture.numpy(), sketch[..., 0].numpy()) for picture, sketch in pairs])}
    control = "pose" if recipe.kind == "keypoint" else recipe.layer
    scores = {"error": control_errors(control, made.pictures, made.wanted.scenes, world.estimator)}
    if control == "pose":
        heatmaps, _ = world.estimator(made.pictures.permute(0, 3, 1, 2).float() * 2 - 1)
        found = joint_positions(heatmaps)
        true = torch.tensor(
            np.stack([scene.figure.joints() for scene in made.wanted.scenes if scene.figure is not None]),
            dtype=torch.float32,
        )
        each = [pck(found[i : i + 1], true[i : i + 1], figure_extent(true[i : i + 1])) for i in range(len(true))]
        scores |= {f"pck@{at}": np.array([found[at] for found in each]) for at in each[0]}
    return scores
