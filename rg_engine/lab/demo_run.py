"""``python -m rg_engine demo``: the example workflows on the demo model, measured on finished pixels."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from ..comfy_host.bootstrap import REPOSITORY
from ..demo.measure import UNITS, control_errors, load_estimator, mean_and_error
from ..demo.scene_pictures import sample_scenes, scene_pictures
from ..guidance import GuidanceSettings
from ..guidance.pictures import as_image
from .cost.timing import time_demo
from .steering import PROMPTS
from .workflow import Executor, Prompt, load_comfyui_nodes, load_extension, read_workflow, with_inputs

COLUMNS = ("train_head", "boundary", "oft")
SAVES_MODELS = ("RG_SaveReadoutHead", "RG_SaveBoundary", "RG_SaveOFT")
CONTROLS = ("pose", "depth", "edges")
SCENE_SEED = 2026
BATCH = 8
#: The paper guides half of 100 steps; the workflows' 30 steps make as many updates with so many in each.
REFERENCE_ITERATIONS = 3


def run_demo(
    out: Path, pictures: int, modes: list[str], strength: float | None = None, edits: list[str] | None = None
) -> dict[str, Any]:
    """Run each control's example workflow for ``pictures`` pictures, and those of ``edits`` once; write demo.png, a picture
    a workflow, report.json."""
    import comfy.utils
    import folder_paths

    logging.getLogger().setLevel(logging.WARNING)
    comfy.utils.set_progress_bar_enabled(False)
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    folder_paths.set_output_directory(str(out / "pictures"))
    folder_paths.set_temp_directory(str(out / "previews"))
    load_extension()
    load_comfyui_nodes("nodes_latent.py")
    executor, estimator = Executor(), load_estimator()
    batches = [(start, min(BATCH, pictures - start)) for start in range(0, pictures, BATCH)]
    scenes = [scene for start, count in batches for scene in sample_scenes(SCENE_SEED + start, count, figure_only=True)]
    report: dict[str, Any] = {"pictures": pictures, "controls": {}, "picture_ratio": {}}
    sheets = []
    targets = scene_pictures(SCENE_SEED, batches[0][1], figure_only=True)
    for control in CONTROLS:
        prompt = read_workflow(REPOSITORY / "example_workflows" / f"{control}.json")
        entry: dict[str, Any] = {"unit": UNITS[control]}
        rows: dict[str, Tensor] = {}
        for mode in ("unguided", *modes):
            drawn, readouts = _make(executor, prompt, mode, batches, strength)
            mean, error = mean_and_error(control_errors(control, drawn, scenes, estimator))
            entry[mode] = {"error": round(mean, 4), "standard_error": round(error, 4)}
            rows[mode], rows["readout"] = drawn, readouts
            print(f"{control:6} {mode:10} error {mean:.4g} +- {error:.2g} ({UNITS[control]})", flush=True)
        for mode in modes:
            entry[mode]["error_ratio"] = round(entry[mode]["error"] / entry["unguided"]["error"], 3)
        report["controls"][control] = entry
        sheets.append(
            [
                ("target", getattr(targets, control)),
                *((mode, rows[mode]) for mode in ("unguided", *modes)),
                ("readout", rows["readout"]),
            ]
        )
    steps = _value(prompt, "RG_ReadoutGuidedKSampler", "steps")
    for mode in modes:
        settings = GuidanceSettings(mode=mode, iterations=REFERENCE_ITERATIONS if mode == "reference" else 1)  # type: ignore[arg-type]
        report["picture_ratio"][mode] = ratio = time_demo(settings, steps)
        print(f"a picture of {steps} steps, {mode}, takes {ratio:.2f} of an unguided one", flush=True)
    for control, sheet in zip(CONTROLS, sheets, strict=True):
        contact_sheet([sheet], 4).save(out / f"{control}.jpg", quality=92)
    for edit in edits or []:
        prompt = read_workflow(REPOSITORY / "example_workflows" / f"{edit}.json")
        make = training_column if edit in COLUMNS else edit_row
        make(executor, prompt).save(out / f"{edit}.jpg", quality=92)
        print(f"wrote {out / edit}.jpg", flush=True)
    (out / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    contact_sheet(sheets, 8).save(out / "demo.png")
    print(f"wrote {out / 'demo.png'} and {out / 'report.json'}")
    return report


def _make(
    executor: Executor, prompt: Prompt, mode: str, batches: list[tuple[int, int]], strength: float | None
) -> tuple[Tensor, Tensor]:
    """Finished pictures and the head's readouts of them, (N, 128, 128, 3)."""
    drawn, readouts = [], []
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
        shown = executor.run(run)
        drawn.append(_pictures(run, shown, "SaveImage"))
        readouts.append(_pictures(run, shown, "PreviewImage"))
    return torch.cat(drawn), torch.cat(readouts)


def edit_row(executor: Executor, prompt: Prompt) -> Image.Image:
    """What an edit's workflow starts from (the picture with its arrows, the scenes, or the pose that a model is guided by),
    then what it saves, side by side."""
    prompt = copy.deepcopy(prompt)
    starts, output = _nodes(prompt, "RG_DragPoints"), 1
    if not starts:
        starts, output = _nodes(prompt, "RG_DemoScene"), 1 if _nodes(prompt, "RG_ApplyReadoutGuidance") else 0
    views = []
    for key in starts:
        view = {"class_type": "PreviewImage", "inputs": {"images": [key, output]}}
        views.append(next((other for other, node in prompt.items() if node == view), f"start {key}"))
        prompt[views[-1]] = view
    shown = executor.run(prompt)
    saved = [_saved(shown[view]) for view in views] + [_pictures(prompt, shown, "SaveImage")]
    return ImageOps.scale(_side_by_side(torch.cat(saved)), 2)


def training_column(executor: Executor, prompt: Prompt) -> Image.Image:
    """What a workflow that learns shows and saves, one below another, equally wide. Nothing is put into the models."""
    prompt = {key: node for key, node in prompt.items() if node["class_type"] not in SAVES_MODELS}
    shown = executor.run(prompt)
    rows = [_side_by_side(_saved(shown[key])) for key in _nodes(prompt, "PreviewImage", "SaveImage")]
    width = max(row.width for row in rows)
    return Image.fromarray(np.concatenate([np.asarray(ImageOps.scale(row, width / row.width)) for row in rows]))


def _pictures(prompt: Prompt, shown: dict[str, Any], class_type: str) -> Tensor:
    """What the node of a class saved, (N, H, W, 3) in 0..1."""
    (node_id,) = _nodes(prompt, class_type)
    return _saved(shown[node_id])


def _saved(output: dict[str, Any]) -> Tensor:
    import folder_paths

    loaded = []
    for saved in output["images"]:
        path = Path(folder_paths.get_directory_by_type(saved["type"])) / saved["subfolder"] / saved["filename"]
        loaded.append(torch.from_numpy(np.asarray(Image.open(path).convert("RGB"), dtype=np.float32) / 255))
    return torch.stack(loaded)


def _nodes(prompt: Prompt, *class_types: str) -> list[str]:
    """The ids of the nodes of some classes."""
    return [key for key, node in prompt.items() if node["class_type"] in class_types]


def _value(prompt: Prompt, class_type: str, name: str) -> Any:
    return prompt[_nodes(prompt, class_type)[0]]["inputs"][name]


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
                image.paste(as_image(picture).resize((size, size)), (margin + k * (size + gap), y))
            y += size + gap
        y += 4 * gap
    return image


def _side_by_side(pictures: Tensor) -> Image.Image:
    """pictures (N, H, W, 3) in 0..1."""
    return as_image(pictures.movedim(0, 1).flatten(1, 2))
