"""``python -m rg_engine benchmark``: what guidance costs, in time and memory, on networks of known shapes.

Every way runs in every turn, one after another, so that whatever else the machine does meets them alike; a step's time is
that of the sampler's one model call, prediction and guidance together.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import statistics
import time
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from torch import Tensor

from ...comfy_host.bootstrap import REPOSITORY
from ...comfy_host.loaded.gradient_scope import Graph
from ...guidance import GuidanceSettings
from ...heads import ReadoutHead
from ..demo_world import load_world
from ..evaluate import markdown
from ..workflow import Executor, load_comfyui_nodes, load_extension, read_workflow, with_inputs
from .frontier import measure_frontier, plot_frontier
from .launches import launches_table
from .models import SHAPES, Shape, random_conds, random_heads, random_model, random_target, with_controlnet, zero_latent
from .operations import count_kept_bytes, operations_table
from .timing import EVERY_STEP, WITH_NEGATIVE, median_ratio, model_calls, whole_picture_ratio
from .transformers import BIG, transformer_table
from .tries import measure_tries

STEPS = 4  # of each run; the first and the last one (too short to be guided) are not counted


@dataclasses.dataclass(frozen=True, kw_only=True)
class Way:
    """How a step is made. pictures: at once, of which one is asked for (the paper's code has the source beside it)."""

    heads: int = 0
    settings: GuidanceSettings = EVERY_STEP
    graph: Graph = "full"
    pictures: int = 1
    controlnet: bool = False


GRADIENT_ALONE = dataclasses.replace(WITH_NEGATIVE, feature_steps=1)
REFERENCE = GuidanceSettings(mode="reference")
MANY_HEADS = "fast, 9 heads"  # tells what one of them costs, which is little beside the noise of a step
WAYS = {
    "plain": Way(),
    "fast": Way(heads=1),
    "fast, 3 heads": Way(heads=3),
    MANY_HEADS: Way(heads=9),
    "fast, light graph": Way(heads=1, graph="light"),
    "fast, with the negative prompt": Way(heads=1, settings=WITH_NEGATIVE),
    "fast, with it, the gradient alone": Way(heads=1, settings=GRADIENT_ALONE),
    "reference": Way(heads=1, settings=REFERENCE),
    "reference, 3 heads": Way(heads=3, settings=REFERENCE),
    "the paper's (source in the batch)": Way(heads=1, settings=REFERENCE, pictures=2),
    "ControlNet": Way(controlnet=True),
}


@torch.inference_mode()
def run_benchmark(
    out: Path, shapes: list[str], turns: int, dtype: str, ways: list[str] | None = None, *,
    pictures: list[int] | None = None, frontier: int = 0, runs: int = 0, counted: list[str] | None = None,
    launches: bool = False, tries: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Measure the shapes; prints tables, writes benchmark.json.

    pictures: whole pictures of so many steps as well. frontier: control against cost on so many pictures of the demo model,
    with a plot, frontier.png. counted: shapes whose operations and bytes are counted instead. runs: so many guided runs of
    the example workflow one after another, for their memory. launches: kernels and host time of a tiny network's steps.
    tries: ways to more control for each backward pass, on so many pictures of the demo model.
    """
    logging.getLogger().setLevel(logging.WARNING)
    comfy.utils.set_progress_bar_enabled(False)
    device = comfy.model_management.get_torch_device()
    precision = {"auto": torch.float32 if device.type == "cpu" else torch.float16}.get(dtype) or getattr(torch, dtype)
    report: dict[str, Any] = {"device": _name(device), "torch": torch.__version__, "dtype": str(precision)}
    report["seconds to load the extension"] = round(seconds_to_load(), 3)
    for name in shapes:
        report[name] = rows = measure_shape(SHAPES[name], precision, turns, ways or list(WAYS), pictures or [])
        print(
            f"\n{name}: {rows['parameters'] / 1e6:.0f}M parameters, {SHAPES[name].cells} cells, {precision}, {_name(device)}"
        )
        print(_table(rows["ways"]), flush=True)
        if rows["a further head"] is not None:
            print(f"a further head: {rows['a further head']:.1%} of a guided step")
        for steps, ratio in rows["pictures"].items():
            print(f"a picture of {steps} steps, guided as by default: {ratio:.3f} of a plain one")
        comfy.model_management.unload_all_models()
        comfy.model_management.soft_empty_cache()
    for name in counted or []:
        report[f"{name}, counted"] = transformer_table(name) if name in BIG else operations_table(SHAPES[name])
        print(f"\n{name}, {'bf16' if name in BIG else 'fp16'}, counted\n{markdown(report[f'{name}, counted'])}", flush=True)
    if launches:
        report["launches"] = launches_table(turns)
        print(f"\nlaunches\n{markdown(report['launches'])}", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    if runs:
        report["resident MiB after runs"] = sizes = memory_over_runs(runs)
        print(f"resident memory over {runs} guided runs: {sizes[0]:.0f} MiB, {sizes[len(sizes) // 2]:.0f}, {sizes[-1]:.0f}")
    if frontier:
        report["frontier"] = measure_frontier(load_world(frontier))
        plot_frontier(report["frontier"], out / "frontier.png")
        print(markdown(report["frontier"]))
    if tries:
        report["tries"] = measure_tries(load_world(tries))
        print(markdown(report["tries"]))
    (out / "benchmark.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    print(f"wrote {out / 'benchmark.json'}")
    return report


def seconds_to_load() -> float:
    """How much later ComfyUI starts with this extension. Its own nodes, loaded in the same way, come first there."""
    import comfy_api.latest  # noqa: F401

    load_comfyui_nodes("nodes_mask.py")
    began = time.perf_counter()
    load_extension()
    return time.perf_counter() - began


def measure_shape(shape: Shape, dtype: torch.dtype, turns: int, ways: list[str], pictures: list[int]) -> dict[str, Any]:
    """Median seconds of a step of each way, its ratio to a plain one's of the same turn, bytes kept for backward, peak
    memory (GPU); what part of a guided step one more head takes; and the ratios of whole pictures, guided as by default, of
    so many steps."""
    model = random_model(shape, dtype)
    heads = random_heads(model, shape, max(1, *(WAYS[name].heads for name in ways)))
    positive, negative = (random_conds(model, shape, seed) for seed in (1, 2))
    controlled = with_controlnet((positive, negative), shape, dtype) if "ControlNet" in ways else None
    seconds: dict[str, list[float]] = {name: [] for name in ways}  # medians, one a turn
    kept: dict[str, int] = {}
    peak: dict[str, int] = {}
    weights = list(model.model.diffusion_model.parameters())
    for turn in range(turns + 1):
        for name in ways:
            way = WAYS[name]
            conds = controlled if way.controlnet and controlled is not None else (positive, negative)
            counting = count_kept_bytes(*weights) if turn == 0 else contextlib.nullcontext([0])
            if turn == 0 and torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            with counting as most:
                times = step_seconds(model, way, heads, conds, zero_latent(shape, way.pictures))
            if turn == 0:
                kept[name] = most[0]
                peak[name] = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
            else:
                seconds[name].append(statistics.median(times))
    found = {
        name: {
            "seconds": round(statistics.median(seconds[name]), 4), "ratio": median_ratio(seconds[name], seconds["plain"]),
            "bytes kept": kept[name], "peak bytes": peak[name],
        } for name in ways
    }  # fmt: skip
    further = None
    if {"fast", MANY_HEADS} <= set(ways):
        more = WAYS[MANY_HEADS].heads - WAYS["fast"].heads
        further = round((median_ratio(seconds[MANY_HEADS], seconds["fast"]) - 1) / more, 4)
    parameters = sum(p.numel() for p in weights)
    latent = zero_latent(shape, 1)
    target = random_target(heads[:1], latent, end_percent=0.5)
    whole = {
        steps: whole_picture_ratio(model, target, GuidanceSettings(), (positive, negative), latent, steps=steps, turns=turns)
        for steps in pictures
    }
    return {"parameters": parameters, "ways": found, "a further head": further, "pictures": whole}


def memory_over_runs(count: int) -> list[float]:
    """Resident memory in MiB after each of ``count`` runs of the pose workflow, each with another seed, 8 steps."""
    import psutil

    prompt = with_inputs(read_workflow(REPOSITORY / "example_workflows" / "pose.json"), "RG_ReadoutGuidedKSampler", steps=8)
    executor, process, sizes = Executor(), psutil.Process(), []
    for seed in range(count):
        executor.run(with_inputs(prompt, "RG_ReadoutGuidedKSampler", seed=seed))
        sizes.append(process.memory_info().rss / 2**20)
    return sizes


def step_seconds(model: Any, way: Way, heads: list[ReadoutHead], conds: Any, latent: Tensor) -> list[float]:
    """Seconds of each model call but the first and the last, of a run of STEPS steps with guidance in every one of them."""
    target = random_target(heads[: way.heads], latent, end_percent=1.0)
    return model_calls(model, target, way.settings, conds, latent, steps=STEPS, graph=way.graph)[1:-1]


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _table(ways: dict[str, dict[str, float]]) -> str:
    lines = [f"{'a step':36} {'seconds':>9} {'ratio':>6} {'kept for backward':>18} {'peak memory':>12}"]
    for name, row in ways.items():
        kept, peak = (f"{row[key] / 2**20:.0f} MiB" if row[key] else "" for key in ("bytes kept", "peak bytes"))
        lines.append(f"{name:36} {row['seconds']:9.4f} {row['ratio']:6.2f} {kept:>18} {peak:>12}")
    return "\n".join(lines)
