"""The kit of adapter files: tests/parity/data/oft, or the folder that READOUT_GUIDANCE_OFT_KIT names."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from comfyui_host import engine
from safetensors.torch import load_file
from small_models import PARITY, parity_model

KIT = Path(os.environ.get("READOUT_GUIDANCE_OFT_KIT") or PARITY / "oft")
FACTS = json.loads((KIT / "facts.json").read_text(encoding="utf-8"))
BESIDE = {"golden.safetensors", "adapter_config.json"}
FOLDERS = sorted(path.parent.name for path in KIT.glob("*/golden.safetensors"))
ON_UNET = [name for name in FOLDERS if "flux" not in name]


def kit_file(folder: str) -> Path:
    return next(path for path in sorted((KIT / folder).iterdir()) if path.name not in BESIDE)


def golden(folder: str) -> dict[str, torch.Tensor]:
    return load_file(KIT / folder / "golden.safetensors")


def coft_eps(folder: str) -> float:
    """What a user has to give: the authors' files do not say it, but for oft-t2i's."""
    facts = FACTS.get(folder, {})
    return facts["eps"] if folder.startswith("authors") and "t2i" not in folder and facts.get("coft") else 0.0


def adapter(folder: str, eps: float | None = None) -> Any:
    adapters = engine("adapters")
    return adapters.load_adapter(kit_file(folder), adapters.ReadOptions(coft_eps=coft_eps(folder) if eps is None else eps))


def model(weights: torch.dtype = torch.float32) -> Any:
    return parity_model(weights, KIT if (KIT / "unet.safetensors").exists() else PARITY)


def network_output(patcher: Any) -> torch.Tensor:
    """The network on the kit's inputs, patched as it is."""
    given = load_file(KIT / "inputs.safetensors")
    network = patcher.model.diffusion_model
    return network(given["x"], given["timestep"].expand(len(given["x"])), context=given["context"])
