"""``python -m rg_engine demo``: the example workflows on the demo model, measured on finished pixels."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..demo.measure import UNITS, control_errors, load_estimator, mean_and_error
from ..demo.scene_pictures import sample_scenes, scene_pictures
from ..guidance import GuidanceSettings, make_plan
from .bootstrap import REPOSITORY
from .demo_model import load_demo_model
from .workflow import Executor, Prompt, load_extension, read_workflow, with_inputs

CONTROLS = ("pose", "depth", "edges")
PROMPTS = ("a red figure, grey wall", "a blue figure, cream wall", "a green figure, pink wall", "a yellow figure, teal wall")
SCENE_SEED = 2026
BATCH = 8
#: The paper guides half of 100 steps; the workflows' 30 steps make as many updates with so many in each.
REFERENCE_ITERATIONS = 3


def run_demo(out: Path, pictures: int, modes: list[str], strength: float | None = None) -> dict[str, Any]:
    """Run each control's example workflow for ``pictures`` pictures; write demo.png, a picture a control, report.json."""
    import comfy.utils
    import folder_paths

    logging.getLogger().setLevel(logging.WARNING)
    comfy.utils.set_progress_bar_enabled(False)
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    folder_paths.set_output_directory(str(out / "pictures"))
    folder_paths.set_temp_directory(str(out / "previews"))
    load_extension()
    executor, estimator = Executor(), load_estimator()
    batches = [(start, min(BATCH, pictures - start)) for start in range(0, pictures, BATCH)]
    scenes = [scene for start, count in batches for scene in sample_scenes(SCENE_SEED + start, count, figure_only=True)]
    report: dict[str, Any] = {"pictures": pictures, "controls": {}}
    sheets = []
    for control in CONTROLS:
        prompt = read_workflow(REPOSITORY / "example_workflows" / f"{control}.json")
        executor.run(with_inputs(prompt, "RG_ReadoutGuidedKSampler", steps=1))  # loads everything, so that it isn't timed
        entry: dict[str, Any] = {"unit": UNITS[control]}
        rows: dict[str, Tensor] = {}
        for mode in ("unguided", *modes):
            drawn, readouts, seconds = _make(executor, prompt, mode, batches, strength)
            mean, error = mean_and_error(control_errors(control, drawn, scenes, estimator))
            entry[mode] = {
                "error": round(mean, 4),
                "standard_error": round(error, 4),
                "seconds_per_picture": round(seconds, 3),
            }
            rows[mode] = drawn
            rows["readout"] = readouts
            print(
                f"{control:6} {mode:10} error {mean:.4g} +- {error:.2g} ({UNITS[control]}), {seconds:.2f} s a picture",
                flush=True,
            )
        steps = _value(prompt, "RG_ReadoutGuidedKSampler", "steps")
        for mode in modes:
            entry[mode]["error_ratio"] = round(entry[mode]["error"] / entry["unguided"]["error"], 3)
            entry[mode]["time_ratio"] = round(
                entry[mode]["seconds_per_picture"] / entry["unguided"]["seconds_per_picture"], 2
            )
            guided_steps = _guided_steps(prompt, mode)
            plain_s = entry["unguided"]["seconds_per_picture"] / steps
            extra_s = (entry[mode]["seconds_per_picture"] - entry["unguided"]["seconds_per_picture"]) / guided_steps
            entry[mode]["guided_steps"] = guided_steps
            entry[mode]["seconds_per_guided_step"] = round(plain_s + extra_s, 4)
        entry["unguided"]["seconds_per_step"] = round(entry["unguided"]["seconds_per_picture"] / steps, 4)
        report["controls"][control] = entry
        layers = dict(zip(("picture", *CONTROLS), scene_pictures(SCENE_SEED, batches[0][1], True)[:4], strict=True))
        sheets.append(
            [
                ("target", layers[control]),
                *((mode, rows[mode]) for mode in ("unguided", *modes)),
                ("readout", rows["readout"]),
            ]
        )
    for control, sheet in zip(CONTROLS, sheets, strict=True):
        contact_sheet([sheet], 4).save(out / f"{control}.jpg", quality=92)
    (out / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    contact_sheet(sheets, 8).save(out / "demo.png")
    print(f"wrote {out / 'demo.png'} and {out / 'report.json'}")
    return report


def _make(
    executor: Executor, prompt: Prompt, mode: str, batches: list[tuple[int, int]], strength: float | None
) -> tuple[Tensor, Tensor, float]:
    """Finished pictures and the head's readouts of them, (N, 128, 128, 3), and seconds a picture of sampling."""
    drawn, readouts, seconds = [], [], 0.0
    for start, count in batches:
        settings: dict[str, Any] = {"seed": 100 + start}
        if mode == "unguided":
            settings["strength"] = 0.0
        else:
            settings["mode"] = mode
            if mode == "reference":
                settings["iterations"] = REFERENCE_ITERATIONS
            if strength is not None:
                settings["strength"] = strength
        run = with_inputs(prompt, "RG_ReadoutGuidedKSampler", **settings)
        run = with_inputs(run, "EmptyLatentImage", batch_size=count)
        run = with_inputs(run, "RG_DemoScene", seed=SCENE_SEED + start, count=count, figure_only=True)
        positive = _value(prompt, "RG_ReadoutGuidedKSampler", "positive")[0]
        run[positive]["inputs"]["text"] = PROMPTS[start // BATCH % len(PROMPTS)]
        began = time.perf_counter()
        shown = executor.run(run)
        seconds += time.perf_counter() - began
        drawn.append(_pictures(run, shown, "SaveImage"))
        readouts.append(_pictures(run, shown, "PreviewImage"))
    return torch.cat(drawn), torch.cat(readouts), seconds / sum(count for _, count in batches)


def _pictures(prompt: Prompt, shown: dict[str, Any], class_type: str) -> Tensor:
    """What a node of a class saved, (N, H, W, 3) in 0..1."""
    import folder_paths

    (node_id,) = (key for key, node in prompt.items() if node["class_type"] == class_type)
    loaded = []
    for saved in shown[node_id]["images"]:
        path = Path(folder_paths.get_directory_by_type(saved["type"])) / saved["subfolder"] / saved["filename"]
        loaded.append(torch.from_numpy(np.asarray(Image.open(path).convert("RGB"), dtype=np.float32) / 255))
    return torch.stack(loaded)


def _guided_steps(prompt: Prompt, mode: str) -> int:
    """How many of the sampler's steps are guided."""
    import comfy.samplers

    sampler, target = (
        next(node["inputs"] for node in prompt.values() if node["class_type"] == kind)
        for kind in ("RG_ReadoutGuidedKSampler", "RG_ReadoutTarget")
    )
    model_sampling = load_demo_model()[0].get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(model_sampling, sampler["scheduler"], sampler["steps"])
    ranges = [(target["start_percent"], target["end_percent"])]
    settings = GuidanceSettings(mode=mode)  # type: ignore[arg-type]
    return len(make_plan(ranges, sigmas.tolist(), settings, model_sampling.percent_to_sigma).steps)


def _value(prompt: Prompt, class_type: str, name: str) -> Any:
    return next(node["inputs"][name] for node in prompt.values() if node["class_type"] == class_type)


def contact_sheet(sheets: list[list[tuple[str, Tensor]]], columns: int) -> Image.Image:
    """Rows of pictures with their names, one block a control."""
    size, gap, margin = 128, 4, 76
    rows = sum(len(sheet) for sheet in sheets)
    image = Image.new("RGB", (margin + columns * (size + gap), rows * (size + gap) + gap * 4 * (len(sheets) - 1)), "white")
    pen, y = ImageDraw.Draw(image), 0
    for sheet in sheets:
        for name, batch in sheet:
            pen.text((6, y + size // 2 - 6), name, fill="black")
            for k, picture in enumerate(batch[:columns]):
                pixels = (picture.clamp(0, 1).numpy() * 255).round().astype(np.uint8)
                image.paste(Image.fromarray(pixels).resize((size, size)), (margin + k * (size + gap), y))
            y += size + gap
        y += 4 * gap
    return image
