"""The parity kit of BoundaryDiffusion: figures recorded from the paper's own code, on the UNet of tests/parity/data."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

FOLDER = Path(__file__).parent / "parity" / "data" / "boundary"


@functools.cache
def golden() -> dict[str, torch.Tensor]:
    return load_file(FOLDER / "golden.safetensors")


@functools.cache
def settings() -> dict[str, Any]:
    return json.loads((FOLDER / "settings.json").read_text())


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())
