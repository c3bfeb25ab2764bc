"""What the evidence on optimized noise asks of finished pictures, and how it is judged by what did not steer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ...comfy_host.demo_model.clip import load_demo_clip
from ...comfy_host.optimized.measured.losses import picture_measure
from ...comfy_host.optimized.measured.vision import PictureEncoder, text_feature
from ...demo.measure import control_errors
from ...demo.scene_pictures import scene_pictures
from ...demo.seen import look
from ...demo.wording import Wording
from ...demo.world import COLOURS, SOLIDS, WALLS
from ...guidance import Target
from ...optimization import Crops, PictureLoss
from ...optimization.losses import ClipLoss
from ..demo_heads import demo_recipe
from ..demo_world import World
from ..steering import SCENE_SEED, scene_target

FIGURE = "a red figure, grey wall"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Aim:
    """What is asked of n pictures: a loss or a target, under a prompt each; and the error of finished pictures
    (n, H, W, 3), a number each."""

    name: str
    prompts: list[str]
    error: Callable[[Tensor], np.ndarray]
    loss: PictureLoss | None = None
    target: Target | None = None


def attributes_aim(world: World, count: int, turned: bool) -> Aim:
    """A figure and a solid of two colours, by a text's distance to the picture; judged by the share of what was asked for
    that is not there.

    The prompt leaves the colours open; or, turned, it names the solid before the figure, as no caption of the demo model's
    training does, and the model gives each the other's colour.
    """
    rng = np.random.default_rng(SCENE_SEED)
    wanted = [_two_things(rng) for _ in range(count)]
    prompts = [str(_turned(each)) if turned else _without_colours(each) for each in wanted]
    vision, clip = load_demo_clip()
    encoder = PictureEncoder(vision)
    with torch.inference_mode(False):
        texts = torch.stack([text_feature(clip, str(each), encoder.width) for each in wanted])

    def error(pictures: Tensor) -> np.ndarray:
        found = [seen.has(each) for seen, each in zip(look(pictures, world.estimator), wanted, strict=True)]
        return np.array([1 - np.mean(list(each.values())) for each in found])

    measure = ClipLoss(embed=encoder, wanted=texts, crops=Crops(size_px=encoder.size_px))
    return Aim(
        name="prompt turned round" if turned else "colours left open", prompts=prompts, error=error,
        loss=PictureLoss(name="CLIP", measure=measure),
    )  # fmt: skip


def pose_aim(world: World, count: int) -> Aim:
    """A scene's pose, which a readout head reads in the finished picture; judged by the estimator's joints."""
    wanted, recipe = scene_pictures(SCENE_SEED + 77, count, figure_only=True), demo_recipe("demo_pose")
    return Aim(
        name="pose, px", prompts=[FIGURE] * count,
        target=scene_target(world, recipe, world.head("demo_pose"), wanted),
        error=lambda pictures: control_errors("pose", pictures, wanted.scenes, world.estimator),
    )  # fmt: skip


def palette_aim(count: int) -> Aim:
    """A picture's colours; nothing is judged."""
    wanted = scene_pictures(SCENE_SEED + 77, count, figure_only=True)
    loss = PictureLoss(name="palette", measure=picture_measure("palette", wanted.picture, None))
    return Aim(name="colours", prompts=[FIGURE] * count, error=lambda pictures: np.zeros(len(pictures)), loss=loss)


def _two_things(rng: np.random.Generator) -> Wording:
    """White is left out: the referee may take it for a wall."""
    colours = [str(name) for name in rng.permutation([name for name in COLOURS if name != "white"])]
    nouns = ("figure", str(rng.choice(SOLIDS)))
    return Wording(things=tuple(zip(colours, nouns, strict=False)), wall=str(rng.choice(list(WALLS))))


def _turned(wording: Wording) -> Wording:
    return dataclasses.replace(wording, things=wording.things[::-1])


def _without_colours(wording: Wording) -> str:
    return " and ".join(f"a {noun}" for _, noun in wording.things) + f", {wording.wall} wall"
