"""The table of ``evaluate`` on optimized noise, against guidance on the way and the best of many pictures.

Two aims: a scene's pose, which a readout head reads in the finished picture, and the colours of a picture. Judged on
finished pixels by what did not steer: the referee's joints, and a histogram of colours.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...comfy_host.optimized.measured.losses import picture_measure
from ...comfy_host.optimized.node import Optimized, optimize_noise
from ...comfy_host.optimized.optimizer import Seen
from ...demo.measure import control_errors, mean_and_error
from ...demo.scene_pictures import ScenePictures, scene_pictures
from ...guidance import GuidanceSettings, Target
from ...optimization import PictureLoss, UpdateSettings
from ..cost.operations import count_kept_bytes
from ..demo_heads import demo_recipe
from ..demo_world import World, encoded, sample
from ..steering import SCENE_SEED, scene_target

PROMPT, STEPS, CFG, SEED = "a red figure, grey wall", 6, 3.0, 100
UPDATES = (5, 10, 20)
#: What an update takes, in pictures made without a gradient.
PICTURES_AN_UPDATE = 4
BINS = 5  # of each channel, in the histogram of colours


@dataclasses.dataclass(frozen=True, kw_only=True)
class Aim:
    """What is asked of n pictures: a loss or a target, and the error of finished pictures (n, H, W, 3)."""

    name: str
    error: Callable[[Tensor], np.ndarray]
    loss: PictureLoss | None = None
    target: Target | None = None


def doodl_table(world: World) -> list[dict[str, Any]]:
    """The error, how far pictures' statistics are from unguided ones', and the time of a picture, a row a way."""
    count = world.pictures
    wanted = scene_pictures(SCENE_SEED + 77, count, figure_only=True)
    with torch.inference_mode():
        usual = _statistics(world, _run(world, _pose(world, wanted), 0, seed=SEED + 1000, count=count)[0])
    rows = []
    for aim in (_pose(world, wanted), _colours(wanted)):
        start = np.nan
        for way, pictures, seconds in _ways(world, aim, count):
            mean, error = mean_and_error(aim.error(pictures))
            start = mean if np.isnan(start) else start
            apart = np.abs((_statistics(world, pictures).mean(0) - usual.mean(0)) / usual.std(0)).mean()
            rows.append(
                {
                    "aim": aim.name, "way": way, "error": round(mean, 3), "se": round(error, 3),
                    "of unguided": round(mean / start, 2),
                    "statistics apart": round(float(apart), 2), "seconds a picture": round(seconds / count, 2),
                }
            )  # fmt: skip
            print(rows[-1], flush=True)
    return rows


def doodl_cost_table(world: World) -> list[dict[str, Any]]:
    """What an update takes, in pictures made by ComfyUI's sampler, and what is kept for its backward, by steps."""
    aim, weights = _colours(scene_pictures(SCENE_SEED + 77, 1, figure_only=True)), list(world.model.model.parameters())
    rows = []
    for cfg in (1.0, CFG):
        for steps in (10, 25, 50):
            seconds: dict[int, list[float]] = {0: [], 1: []}  # of the processor, which other programs do not change
            for updates in (0, 1, 0, 1):
                began = time.process_time()
                with count_kept_bytes(*weights) as kept:
                    _run(world, aim, updates, seed=SEED, count=1, steps=steps, cfg=cfg)
                seconds[updates].append(time.process_time() - began)
            plain, both = min(seconds[0]), min(seconds[1])
            rows.append(
                {
                    "cfg": cfg, "steps": steps, "seconds a picture": round(plain, 2),
                    "an update, in pictures": round((both - plain) / plain, 2), "MiB kept": round(kept[0] / 2**20, 2),
                }
            )  # fmt: skip
    return rows


def _ways(world: World, aim: Aim, count: int) -> Any:
    pictures, _, seconds = _run(world, aim, 0, seed=SEED, count=count)
    yield "unguided", pictures, seconds
    if aim.target is not None:
        for iterations in (1, 4):
            began = time.perf_counter()
            made = sample(
                world, aim.target, _empty(count), GuidanceSettings(iterations=iterations), prompt=PROMPT, seed=SEED,
                steps=STEPS, cfg=CFG, sampler_name="euler",
            )  # fmt: skip
            yield f"guided on the way, {iterations} iterations", made, time.perf_counter() - began
    best, lowest, spent = pictures, torch.full((count,), torch.inf), 0.0
    for number in range(PICTURES_AN_UPDATE * UPDATES[-1]):
        made, losses, seconds = _run(world, aim, 0, seed=SEED + number, count=count)
        better = losses < lowest
        best, lowest = torch.where(better[:, None, None, None], made, best), torch.where(better, losses, lowest)
        spent += seconds
        if (number + 1) / PICTURES_AN_UPDATE in UPDATES:
            yield f"best of {number + 1}", best, spent
    began = time.perf_counter()
    found: list[tuple[Tensor, float]] = []

    def watch(seen: Seen) -> None:
        images = (seen.images.float() / 2 + 0.5).clamp(0, 1).movedim(1, -1).cpu()
        better = seen.best[:, None, None, None]
        found.append((torch.where(better, images, found[-1][0]) if found else images, time.perf_counter() - began))

    _run(world, aim, UPDATES[-1], seed=SEED, count=count, watch=watch)
    for updates in UPDATES:
        yield f"optimized, {updates} updates", *found[updates]


def _pose(world: World, wanted: ScenePictures) -> Aim:
    recipe = demo_recipe("demo_pose")
    return Aim(
        name="pose, px", target=scene_target(world, recipe, world.head("demo_pose"), wanted),
        error=lambda pictures: control_errors("pose", pictures, wanted.scenes, world.estimator),
    )  # fmt: skip


def _colours(wanted: ScenePictures) -> Aim:
    measure = picture_measure("palette", wanted.picture, None)
    return Aim(
        name="colours, share of pixels", loss=PictureLoss(name="palette", measure=measure),
        error=lambda pictures: np.array(
            [_histogram_distance(a, b) for a, b in zip(pictures, wanted.picture, strict=True)]
        ),
    )  # fmt: skip


def _run(
    world: World, aim: Aim, updates: int, *, seed: int, count: int, steps: int = STEPS, cfg: float = CFG,
    watch: Callable[[Seen], None] = lambda seen: None,
) -> tuple[Tensor, Tensor, float]:  # fmt: skip
    """Finished pictures (n, H, W, 3) in 0..1, the losses that they were chosen by (n,), and seconds."""
    began = time.perf_counter()
    with torch.inference_mode():
        done: Optimized = optimize_noise(
            world.model, world.vae, aim.loss, aim.target, UpdateSettings(keep="white", nesterov=True), updates=updates,
            coupled=False, seed=seed, steps=steps, cfg=cfg, sampler_name="euler", scheduler="normal",
            positive=encoded(world.clip, [PROMPT]), negative=encoded(world.clip, [""]), latent=_empty(count),
            denoise=1.0, watch=watch,
        )  # fmt: skip
        pictures = world.vae.decode(done.latent["samples"]).clamp(0, 1).cpu()
    return pictures, done.best, time.perf_counter() - began


def _empty(count: int) -> dict[str, Any]:
    return {"samples": torch.zeros(count, 4, 16, 16)}


def _histogram_distance(a: Tensor, b: Tensor) -> float:
    """The share of pixels whose colour would have to change, of two pictures (H, W, 3)."""
    found = []
    for picture in (a, b):
        cells = (picture.clamp(0, 0.999) * BINS).long()
        number = cells[..., 0] * BINS * BINS + cells[..., 1] * BINS + cells[..., 2]
        found.append(torch.bincount(number.flatten(), minlength=BINS**3) / number.numel())
    return float((found[0] - found[1]).abs().sum() / 2)


def _statistics(world: World, pictures: Tensor) -> np.ndarray:
    """Mean and spread of each channel of the autoencoder's latents, (n, 16)."""
    latents = world.vae.encode(pictures).flatten(2)
    return torch.cat([latents.mean(-1), latents.std(-1)], 1).cpu().numpy()
