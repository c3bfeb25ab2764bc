"""How much slower guidance makes a picture: plain and guided runs of one sampler, turn by turn, medians."""

from __future__ import annotations

import statistics
import time
from typing import Any

import comfy.samplers
import torch

from ..demo.scene_pictures import scene_pictures
from ..guidance import GuidanceSettings, Target, make_plan
from .demo_model import load_demo_model
from .folders import load_named_head
from .sampling import guided_ksampler

REPEATS = 3
PICTURES = 4


def time_guidance(control: str, settings: GuidanceSettings, steps: int) -> dict[str, Any]:
    """Seconds of a plain and of a guided step on the demo model, and whole picture against whole picture.

    PICTURES pictures at once, cfg above 1; a machine that is busy otherwise disturbs both alike.
    """
    with torch.inference_mode():
        model, clip, _ = load_demo_model()
        picture = getattr(scene_pictures(0, 1, figure_only=True), control)
        target = Target(head=load_named_head(f"demo_{control}.safetensors"), image=picture)
        inputs = {
            "seed": 0, "steps": steps, "cfg": 3.0, "sampler_name": "euler_ancestral", "scheduler": "normal", "denoise": 1.0,
            "positive": [[clip.encode("a red figure, grey wall"), {}]], "negative": [[clip.encode(""), {}]],
            "latent": {"samples": torch.zeros(PICTURES, 4, 16, 16)},
        }  # fmt: skip
        seconds: dict[str, list[float]] = {"plain": [], "guided": []}
        for turn in range(REPEATS + 1):
            for name, wanted in (("plain", None), ("guided", target)):
                began = time.perf_counter()
                guided_ksampler(model, wanted, settings, **inputs)
                if turn:  # the first one warms up
                    seconds[name].append(time.perf_counter() - began)
    plain, guided = statistics.median(seconds["plain"]), statistics.median(seconds["guided"])
    sampling = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", steps).tolist()
    ranges = [(target.start_percent, target.end_percent)]
    guided_steps = len(make_plan(ranges, sigmas, settings, lambda p: float(sampling.percent_to_sigma(p))).steps)
    return {
        "steps": steps,
        "guided_steps": guided_steps,
        "seconds_per_plain_step": round(plain / steps / PICTURES, 5),
        "seconds_per_guided_step": round((plain / steps + (guided - plain) / guided_steps) / PICTURES, 5),
        "guided_step_ratio": round(1 + (guided - plain) / guided_steps / (plain / steps), 2),
        "whole_picture_ratio": round(guided / plain, 3),
    }
