"""``python -m rg_engine packs``: tries the combinations of every pack that is found, and writes the table of them."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...errors import ReadoutGuidanceError
from .bench import make_bench
from .loading import load_pack, start_comfyui, version_of
from .table import document
from .trial import Combination, Row, attempt, plain
from .tried import animation, conditioning, core, core_models, crops, layers, res4lyf

#: ComfyUI's own nodes, in three lists.
CORE = ("ComfyUI-sampling", "ComfyUI-patches", "ComfyUI-compiled")
#: Each pack by the name of its folder, and what is tried with it.
PACKS: tuple[tuple[str, Callable[[], tuple[Combination, ...]]], ...] = (
    (CORE[0], core.combinations),
    (CORE[1], core_models.combinations),
    (CORE[2], core_models.compiled),
    ("RES4LYF", res4lyf.combinations),
    ("ComfyUI-TiledDiffusion", crops.tiled_diffusion),
    ("ComfyUI_UltimateSDUpscale", crops.ultimate_upscale),
    ("ComfyUI-Impact-Pack", crops.impact),
    ("ComfyUI-AnimateDiff-Evolved", animation.combinations),
    ("ComfyUI-Advanced-ControlNet", conditioning.advanced_controlnet),
    ("ComfyUI_IPAdapter_plus", conditioning.ipadapter),
    ("comfyui-prompt-control", conditioning.prompt_control),
    ("ComfyUI-GGUF", layers.gguf),
    ("sd-perturbed-attention", layers.perturbed),
    ("ComfyUI-KJNodes", layers.kjnodes),
)


def run_packs(folder: Path | None, out: Path, only: list[str], pictures: int) -> None:
    """Try what is found in ``folder``; rows of packs that were not asked for stay as they are in ``out`` and its .json."""
    names = [name for name, _ in PACKS]
    if unknown := [name for name in only if name not in names]:
        raise ReadoutGuidanceError(f"there is nothing to try for {', '.join(unknown)}: choose among {', '.join(names)}")
    import comfy.utils

    if folder is None and (told := os.environ.get("READOUT_GUIDANCE_PACKS")):
        folder = Path(told)
    logging.getLogger().setLevel(logging.WARNING)
    comfyui = start_comfyui()
    comfy.utils.set_progress_bar_enabled(False)
    res4lyf.note_samplers()
    bench = make_bench(pictures, folder)
    base = plain(bench)
    print(f"ComfyUI {comfyui}, euler: {base.unguided:.1f} px unguided, {base.guided:.1f} px guided", flush=True)
    data = out.with_suffix(".json")
    report = json.loads(data.read_text(encoding="utf-8")) if data.exists() else {}
    for name, combinations in PACKS:
        if only and name not in only:
            continue
        key = f"{name} {comfyui}"
        found = name in CORE or (folder is not None and (folder / name).is_dir())
        entry: dict[str, Any] = {"pack": name, "comfyui": comfyui, "found": found, "loading": "", "version": "", "rows": []}
        entry |= {"euler": [base.unguided, base.guided], "pictures": pictures}
        if found and name not in CORE:
            assert folder is not None
            entry["version"] = version_of(folder / name)
            entry["loading"] = load_pack(folder / name)
        for combination in combinations() if found else ():
            row = attempt(bench, name, combination, base, comfyui)
            print(line(row), flush=True)
            entry["rows"].append(dataclasses.asdict(row))
            report[key] = entry
            _write(report, out)
        report[key] = entry
        _write(report, out)


def _write(report: dict[str, Any], out: Path) -> None:
    """After each row: a run may be stopped."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(report, indent=1, default=str), encoding="utf-8")
    out.write_text(document(report), encoding="utf-8")


def line(row: Row) -> str:
    """A row in the terminal."""
    left = "" if row.restored else f" NOT RESTORED {row.left[:3]}"
    said = " | ".join([row.failed, *row.losses, *row.said]).strip(" |")
    return (
        f"{row.pack}: {row.nodes}: {row.tried}: {row.unguided:.3g} -> {row.guided:.3g} {row.unit} ({row.other[0]:.3g} -> "
        f"{row.other[1]:.3g}), from plain {row.from_plain:.3f}, effect {row.effect:.3f}, {row.verdict}{left}; "
        f"{sum(row.seconds):.1f} s; {said}"
    )
