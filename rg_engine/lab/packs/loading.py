"""A headless ComfyUI that other packs load into, and their nodes, called without a workflow."""

from __future__ import annotations

import asyncio
import logging
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...errors import ReadoutGuidanceError
from ..workflow import load_extension

#: What a pack imports and its repository does not hold, by pack: left empty, so that the rest of the pack loads.
ABSENT = {"ComfyUI-Impact-Pack": ("impact.subpack_nodes",)}


def start_comfyui() -> str:
    """Make what packs take for granted: ComfyUI's server object, its extra nodes, this extension. Returns the version."""
    import comfyui_version
    import utils.install_util  # noqa: F401  ComfyUI's own utils, before another's is found

    import nodes
    import server

    server.PromptServer(asyncio.new_event_loop())
    asyncio.run(nodes.init_builtin_extra_nodes())
    load_extension()
    return comfyui_version.__version__


def load_pack(path: Path) -> str:
    """Load a pack as ComfyUI's start does; returns what went wrong, "" if nothing did.

    Of a pack that this ComfyUI loads in part, the nodes of the modules that did load are added by their class names.
    """
    import nodes

    for name in ABSENT.get(path.name, ()):
        sys.modules.setdefault(name, types.ModuleType(name))
    kept = Kept()
    logging.getLogger().addHandler(kept)
    try:
        loaded = asyncio.run(nodes.load_custom_node(str(path), module_parent="custom_nodes"))
    finally:
        logging.getLogger().removeHandler(kept)
    if loaded:
        return ""
    for module in modules_of(path):
        for node_id, node in {**_classes(module), **(getattr(module, "NODE_CLASS_MAPPINGS", None) or {})}.items():
            nodes.NODE_CLASS_MAPPINGS.setdefault(node_id, node)
    reasons = [line for line in kept.lines if "Error while" in line or "Cannot import" in line]
    reason = reasons[-1] if reasons else "no reason was given"
    return re.sub(re.escape(str(path)), path.name, reason.partition(": ")[2] or reason)


def modules_of(path: Path) -> Iterator[Any]:
    """The modules of a pack that are loaded."""
    package = str(path).replace(".", "_x_")
    yield from [module for name, module in list(sys.modules.items()) if name == package or name.startswith(package + ".")]


def pack_module(path: Path, name: str) -> Any:
    """A module of a pack, by its dotted path in it. Raises ReadoutGuidanceError if it was not loaded."""
    module = sys.modules.get(str(path).replace(".", "_x_") + "." + name)
    if module is None:
        raise ReadoutGuidanceError(f"{path.name} did not load its module {name}")
    return module


def version_of(path: Path) -> str:
    """The version that a pack says it is."""
    file = path / "pyproject.toml"
    found = re.search(r'^version\s*=\s*"([^"]+)"', file.read_text(encoding="utf-8"), re.M) if file.exists() else None
    return found[1] if found else ""


def node(class_type: str, **inputs: Any) -> Any:
    """Run a node with some of its inputs, the others at their defaults; its output, a tuple where it has more than one."""
    import nodes

    found = nodes.NODE_CLASS_MAPPINGS.get(class_type)
    if found is None:
        raise ReadoutGuidanceError(f"there is no node {class_type!r}")
    given = {**_defaults(found), **inputs}
    if hasattr(found, "define_schema"):
        out = found.execute(**given)
        out = getattr(out, "result", out)
    else:
        out = getattr(found(), found.FUNCTION)(**given)
    if isinstance(out, dict):
        out = out["result"]
    return out[0] if isinstance(out, tuple) and len(out) == 1 else out


def has_node(class_type: str) -> bool:
    import nodes

    return class_type in nodes.NODE_CLASS_MAPPINGS


class Kept(logging.Handler):
    """Keeps what is logged."""

    def __init__(self, level: int = logging.INFO) -> None:
        super().__init__(level)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    @property
    def lines(self) -> list[str]:
        return [record.getMessage() for record in self.records]


def _classes(module: Any) -> dict[str, Any]:
    """The node classes of a module, by name."""
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, type) and (hasattr(value, "define_schema") or hasattr(value, "INPUT_TYPES"))
    }


def _defaults(found: Any) -> dict[str, Any]:
    """What the page would put into a node's widgets."""
    try:
        types_ = found.INPUT_TYPES()
    except Exception:  # a schema that this ComfyUI cannot make: every input has to be given
        return {}
    values = {}
    for kind in ("required", "optional"):
        for name, spec in types_.get(kind, {}).items():
            options = spec[1] if len(spec) > 1 and isinstance(spec[1], dict) else {}
            if "default" in options:
                values[name] = options["default"]
            elif isinstance(spec[0], (list, tuple)) and spec[0]:
                values[name] = spec[0][0]
            elif spec[0] == "COMBO" and options.get("options"):
                values[name] = options["options"][0]
            elif kind == "required" and spec[0] in ("INT", "FLOAT"):
                values[name] = 0
    return values
