"""How long a sampler's model calls take, guided and not."""

from __future__ import annotations

import dataclasses
import statistics
import time
from typing import Any

import comfy.sample
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...comfy_host.demo_model import load_demo_model
from ...comfy_host.guided.model import guide
from ...comfy_host.loaded.gradient_scope import Graph
from ...demo.scene_pictures import scene_pictures
from ...guidance import GuidanceSettings, Target
from ..demo_world import demo_head, encoded

KEY = "timing"
TURNS = 2
#: Guides in each step, however short, and, but for the first, as most guided steps are: without the negative prompt's pass.
EVERY_STEP = GuidanceSettings(interval=0.0, keep_negative=50)
WITH_NEGATIVE = dataclasses.replace(EVERY_STEP, keep_negative=0)
PICTURES = 4


def model_calls(
    model: Any, target: Target | None, settings: GuidanceSettings, conds: Any, latent: Tensor, *, steps: int,
    cfg: float = 7.5, graph: Graph = "full",
) -> list[float]:  # fmt: skip
    """Seconds of each model call of a run (euler, one a step): the predictions of all prompts, and the guidance.

    Args: conds, positive and negative CONDITIONING; latent (B, C, H, W).
    """
    times: list[float] = []
    timed = model.clone()
    timed.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, _timer(times))
    guided = guide(timed, target, settings, graph=graph)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(0))
    comfy.sample.sample(guided, noise, steps, cfg, "euler", "normal", *conds, latent, seed=0, disable_pbar=True)
    return times


def whole_picture_ratio(
    model: Any, target: Target | None, settings: GuidanceSettings, conds: Any, latent: Tensor, *, steps: int, turns: int
) -> float:
    """The time of a guided picture over a plain one's, see :func:`whole_picture_ratios`."""
    ways = {"plain": (None, conds), "guided": (target, conds)}
    return whole_picture_ratios(model, ways, settings, latent, steps=steps, turns=turns)["guided"]


def whole_picture_ratios(
    model: Any, ways: dict[str, tuple[Target | None, Any]], settings: GuidanceSettings, latent: Tensor, *, steps: int,
    turns: int,
) -> dict[str, float]:  # fmt: skip
    """The time of a picture of each way (a target, positive and negative) over the first one's; each step's is its median
    over so many turns of all of them."""
    calls: dict[str, list[list[float]]] = {name: [] for name in ways}
    for turn in range(turns + 1):
        for name, (target, conds) in ways.items():
            found = model_calls(model, target, settings, conds, latent, steps=steps)
            calls[name] += [found] if turn else []  # the first one warms up
    seconds = {name: sum(map(statistics.median, zip(*each, strict=True))) for name, each in calls.items()}
    first = next(iter(seconds.values()))
    return {name: round(each / first, 3) for name, each in seconds.items()}


def median_ratio(seconds: list[float], plain: list[float]) -> float:
    """Of pairs measured one after the other: a busy machine disturbs both of a pair alike."""
    return round(statistics.median(a / b for a, b in zip(seconds, plain, strict=True)), 3)


@torch.inference_mode()
def time_demo(settings: GuidanceSettings, steps: int) -> float:
    """:func:`whole_picture_ratio` of the demo model with its pose head, PICTURES pictures at once."""
    model, clip, _ = load_demo_model()
    picture = scene_pictures(0, 1, figure_only=True).pose
    conds = encoded(clip, ["a red figure, grey wall"]), encoded(clip, [""])
    target = Target(head=demo_head("demo_pose"), image=picture)
    latent = torch.zeros(PICTURES, model.model.latent_format.latent_channels, 16, 16)
    return whole_picture_ratio(model, target, settings, conds, latent, steps=steps, turns=TURNS)


def _timer(times: list[float]) -> Any:
    def timed(executor: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        _wait(x.device)
        began = time.perf_counter()
        out = executor(x, *args, **kwargs)
        _wait(x.device)
        times.append(time.perf_counter() - began)
        return out

    return timed


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
