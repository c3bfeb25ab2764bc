"""Trains the heads of the demo model on scenes of the demo world: ``python -m rg_engine train-demo heads``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..comfy_host.demo_model import NETWORKS, Network, load_demo_model
from ..comfy_host.training.head import train_head
from ..comfy_host.training.node import graph_examples
from ..demo import DEMO_HEADS
from ..demo.scene_pictures import Sequence, scene_pictures
from ..demo.world import Scene
from ..heads import ReadoutHead, save_head
from ..training import Examples, TrainingSettings, in_a_row
from ..types import HeadKind
from .demo_world import encoded, head_path

CHUNK = 100  # scenes drawn and encoded at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A demo head: its kind, the layer of :class:`ScenePictures` that it learns, the empty value of sparse ones, and
    settings."""

    name: str
    kind: HeadKind
    layer: str
    background: float | None = None
    sequence: Sequence = "scenes"
    steps: int = 1600
    batch: int = 12
    shift: float = 0.0
    networks: tuple[Network, ...] = NETWORKS


RECIPES = (
    Recipe(name="demo_pose", kind="spatial", layer="pose", background=-0.5),
    Recipe(name="demo_depth", kind="spatial", layer="depth"),
    Recipe(name="demo_edges", kind="spatial", layer="edges", background=-0.5),
    Recipe(name="demo_keypoints", kind="keypoint", layer="keypoints", background=0.0, shift=0.125, networks=("UNet",)),
    Recipe(name="demo_sketch", kind="lgp", layer="edges", shift=0.125, networks=("UNet",)),
    Recipe(
        name="demo_correspondence", kind="correspondence", layer="tracks", sequence="pairs", steps=2400, batch=8, shift=0.125
    ),
    Recipe(name="demo_appearance", kind="appearance", layer="figure", sequence="triplets", steps=2400, batch=6, shift=0.125),
)
WIDTH = 64
#: Which block the heads of a network read; of the UNet, its own taps.
BLOCKS: dict[Network, str] = {"UNet": "", "transformer": "layers.3"}
TRAINING_SEED = 31  # of the scenes; evaluations take others


def recipes_of(network: Network) -> tuple[Recipe, ...]:
    return tuple(recipe for recipe in RECIPES if network in recipe.networks)


def demo_recipe(name: str) -> Recipe:
    return next(recipe for recipe in RECIPES if recipe.name == name)


def train_demo_heads(work: Path, examples: int = 4000, names: list[str] | None = None, network: Network = "UNet") -> None:
    """Train every demo head of a network (or ``names``); each goes on from its checkpoint in ``work``."""
    with torch.inference_mode():
        model, clip, vae = load_demo_model(network)
    DEMO_HEADS.mkdir(parents=True, exist_ok=True)
    for recipe in recipes_of(network):
        if names and recipe.name not in names:
            continue
        settings = TrainingSettings(
            steps=recipe.steps, batch=recipe.batch, shift=recipe.shift, validation_share=0.02, validate_every=250, ema=0.995
        )
        data, scenes = demo_examples(recipe, examples, vae, TRAINING_SEED)
        path = head_path(recipe.name, network)
        head = train_demo_head(
            model, clip, recipe, data, scenes, settings, checkpoint=work / f"{path.stem}.checkpoint", block=BLOCKS[network]
        )
        save_head(head, path, dtype=torch.float16)


def train_demo_head(
    model: Any, clip: Any, recipe: Recipe, data: Examples, scenes: list[Scene], settings: TrainingSettings, **more: Any
) -> ReadoutHead:
    """One head on demo examples; every other picture has its caption as its prompt, the others none."""

    def report(progress: Any) -> None:
        if progress.validation is not None:
            print(
                f"{recipe.name} step {progress.step}: {progress.loss:.5f}, validation {progress.validation:.5f}", flush=True
            )

    shown = [scene.caption() if i % 2 else "" for i, scene in enumerate(scenes)]
    with torch.inference_mode():
        positive = encoded(clip, shown)
    head, _ = train_head(
        model, data, settings, name=f"{recipe.name}.safetensors", positive=positive, projection=WIDTH,
        background=recipe.background, facts={"control": recipe.layer}, report=report, **more,
    )  # fmt: skip
    if head.spec.backbone == "a UNet":
        return dataclasses.replace(head, spec=dataclasses.replace(head.spec, backbone="demo model"))
    return head


def demo_examples(
    recipe: Recipe, count: int, vae: Any, seed: int, figure_only: bool = False
) -> tuple[Examples, list[Scene]]:
    """``count`` examples of a recipe (scenes, pairs or triplets) and the scenes of their pictures."""
    latents: list[Tensor] = []
    truths: list[Tensor] = []
    scenes: list[Scene] = []
    with torch.inference_mode():
        for first in range(0, count, CHUNK):
            drawn = scene_pictures(
                chunk_seed(seed, first),
                min(CHUNK, count - first),
                figure_only,
                recipe.sequence,
            )
            coded = vae.encode(drawn.picture).float()
            truth = getattr(drawn, recipe.layer)
            if recipe.kind == "lgp":
                truth = vae.encode(truth).float()
            part = graph_examples(recipe.kind, coded, truth)
            latents.append(part.latents.clone())
            scenes += drawn.scenes
            if part.truth is not None:
                truths.append(part.truth.clone())
    with torch.inference_mode(False):
        truth = torch.cat(truths).clone() if truths else None
        return in_a_row(recipe.kind, torch.cat(latents).clone(), truth), scenes


def chunk_seed(seed: int, first: int) -> int:
    """Of the scenes from number ``first`` on."""
    return int(np.random.default_rng([seed, first]).integers(2**31))
