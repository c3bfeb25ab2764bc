"""The tables of ``evaluate`` on optimized noise, against guidance on the way, and the best of many pictures.

Judged on finished pixels by what did not steer (:mod:`.doodl_aims`); rivals have as many calls of the network.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...comfy_host.optimized.node import Optimized, optimize_noise
from ...comfy_host.optimized.optimizer import Seen
from ...comfy_host.optimized.trajectory import Noises
from ...demo.measure import mean_and_error
from ...guidance import GuidanceSettings
from ...optimization import UpdateSettings
from ..cost.operations import count_kept_bytes
from ..demo_world import World, encoded, sample
from .doodl_aims import FIGURE, Aim, attributes_aim, palette_aim, pose_aim
from .one_step import OneStep, one_step_guided

STEPS, CFG, SEED = 4, 1.0, 100
#: What an update costs is told without a negative prompt and with one.
COST_CFGS = (1.0, 3.0)
UPDATES = (5, 10, 25, 50)
#: What an update takes, in pictures made without a gradient.
PICTURES_AN_UPDATE = 4
#: The sampler whose noises on the way are optimized too, or not.
STOCHASTIC = "euler_ancestral"
#: Of one-step guidance: of 1, 3 and 8 in a trial the one with the least error; 20 wrecked pictures.
PATH = 8.0
#: A way's name, its updates or as many network calls, pictures (n, H, W, 3), and seconds of the processor.
Made = tuple[str, int, Tensor, float]


def doodl_table(world: World) -> list[dict[str, Any]]:
    """The error, how it compares with optimized noise of as many calls, picture by picture, how far statistics are from
    unguided pictures', and the time of a picture; a row a way and budget."""
    count, rows = world.pictures, []
    aims = [attributes_aim(world, count, turned) for turned in (False, True)] + [pose_aim(world, count)]
    for aim in aims:
        usual = _statistics(world, _run(world, aim, 0, seed=SEED + 1000)[0])
        made = [
            (way, budget, pictures, seconds, aim.error(pictures)) for way, budget, pictures, seconds in _ways(world, aim)
        ]
        optimized = {budget: errors for way, budget, _, _, errors in made if way == "optimized"}
        for way, budget, pictures, seconds, errors in made:
            mean, error = mean_and_error(errors)
            apart = np.abs((_statistics(world, pictures).mean(0) - usual.mean(0)) / usual.std(0)).mean()
            row = {"aim": aim.name, "way": way, "updates": budget, "error": round(mean, 3), "se": round(error, 3)}
            if way != "optimized":
                more, se = mean_and_error(errors - optimized[budget])
                row |= {"more than optimized": round(more, 3), "its se": round(se, 3)}
            rows.append(
                {**row, "statistics apart": round(float(apart), 2), "CPU s a picture": round(seconds / count, 2)}
            )  # fmt: skip
            print(rows[-1], flush=True)
    return rows


def doodl_cost_table(world: World) -> list[dict[str, Any]]:
    """What an update takes, in pictures made by ComfyUI's sampler, and what is kept for its backward, by steps."""
    aim, weights = palette_aim(1), list(world.model.model.parameters())
    rows = []
    for cfg in COST_CFGS:
        for steps in (10, 25, 50):
            seconds: dict[int, list[float]] = {0: [], 1: []}
            for updates in (0, 1, 0, 1):
                with count_kept_bytes(*weights) as kept:
                    seconds[updates].append(_run(world, aim, updates, seed=SEED, steps=steps, cfg=cfg)[2])
            plain, both = min(seconds[0]), min(seconds[1])
            rows.append(
                {
                    "cfg": cfg, "steps": steps, "seconds a picture": round(plain, 2),
                    "an update, in pictures": round((both - plain) / plain, 2), "MiB kept": round(kept[0] / 2**20, 2),
                }
            )  # fmt: skip
    return rows


def _ways(world: World, aim: Aim) -> Iterator[Made]:
    yield from _optimized(world, aim)
    for noises in ("first", "all"):
        yield from _optimized(world, aim, STOCHASTIC, noises)
    yield from _best_of(world, aim)
    if aim.loss is not None:
        for moves in UPDATES:
            yield "one-step guidance", moves, *one_step(world, aim, OneStep(loss=aim.loss, moves=moves, path=PATH))
    if aim.target is not None:
        yield from _guided(world, aim)


def _guided(world: World, aim: Aim) -> Iterator[Made]:
    """On the way, by the target's readout at each step; so many moves in each tenth of the denoising."""
    for iterations in UPDATES[:2]:
        began = time.process_time()
        made = sample(
            world, aim.target, _empty(len(aim.prompts)), GuidanceSettings(iterations=iterations), prompt=FIGURE, seed=SEED,
            steps=STEPS, cfg=CFG, sampler_name="euler",
        )  # fmt: skip
        yield "guided on the way", iterations, made, time.process_time() - began


def _optimized(world: World, aim: Aim, sampler_name: str = "euler", noises: Noises = "first") -> Iterator[Made]:
    began = time.process_time()
    found: list[tuple[Tensor, float]] = []

    def watch(seen: Seen) -> None:
        images = (seen.images.float() / 2 + 0.5).clamp(0, 1).movedim(1, -1).cpu()
        better = seen.best[:, None, None, None]
        found.append((torch.where(better, images, found[-1][0]) if found else images, time.process_time() - began))

    _run(world, aim, UPDATES[-1], seed=SEED, watch=watch, sampler_name=sampler_name, noises=noises)
    way = "optimized" if sampler_name == "euler" else f"optimized, {sampler_name}, noises {noises}"
    for updates in (0, *UPDATES):
        yield way, updates, *found[updates]


def _best_of(world: World, aim: Aim) -> Iterator[Made]:
    """By the same loss, of as many seeds as take the network's time of as many updates."""
    best, lowest, spent = None, torch.full((len(aim.prompts),), torch.inf), 0.0
    for number in range(PICTURES_AN_UPDATE * UPDATES[-1]):
        made, losses, seconds = _run(world, aim, 0, seed=SEED + number)
        better = losses < lowest
        best = made if best is None else torch.where(better[:, None, None, None], made, best)
        lowest, spent = torch.where(better, losses, lowest), spent + seconds
        if (number + 1) / PICTURES_AN_UPDATE in UPDATES:
            yield f"best of {number + 1}", (number + 1) // PICTURES_AN_UPDATE, best, spent


def one_step(world: World, aim: Aim, settings: OneStep) -> tuple[Tensor, float]:
    """Pictures (n, H, W, 3), and seconds of the processor."""
    began = time.process_time()
    with torch.inference_mode():
        latents = one_step_guided(
            world.model, world.vae, settings, seed=SEED, steps=STEPS, cfg=CFG, scheduler="normal",
            positive=encoded(world.clip, aim.prompts), negative=encoded(world.clip, [""]), latent=_empty(len(aim.prompts)),
        )  # fmt: skip
        return world.vae.decode(latents).clamp(0, 1).cpu(), time.process_time() - began


def _run(
    world: World, aim: Aim, updates: int, *, seed: int, steps: int = STEPS, cfg: float = CFG,
    sampler_name: str = "euler", noises: Noises = "first", watch: Callable[[Seen], None] = lambda seen: None,
) -> tuple[Tensor, Tensor, float]:  # fmt: skip
    """Finished pictures (n, H, W, 3) in 0..1, the losses that they were chosen by (n,), and seconds of the processor, which
    other programs do not change."""
    began = time.process_time()
    with torch.inference_mode():
        done: Optimized = optimize_noise(
            world.model, world.vae, aim.loss, aim.target, UpdateSettings(momentum=0.0, keep="white"), updates=updates,
            coupled=False, seed=seed, steps=steps, cfg=cfg, sampler_name=sampler_name,
            scheduler="normal", positive=encoded(world.clip, aim.prompts), negative=encoded(world.clip, [""]),
            latent=_empty(len(aim.prompts)), denoise=1.0, noises=noises, watch=watch,
        )  # fmt: skip
        pictures = world.vae.decode(done.latent["samples"]).clamp(0, 1).cpu()
    return pictures, done.best, time.process_time() - began


def _empty(count: int) -> dict[str, Any]:
    return {"samples": torch.zeros(count, 4, 16, 16)}


def _statistics(world: World, pictures: Tensor) -> np.ndarray:
    """Mean and spread of each channel of the autoencoder's latents, (n, 16)."""
    latents = world.vae.encode(pictures).flatten(2)
    return torch.cat([latents.mean(-1), latents.std(-1)], 1).cpu().numpy()
