"""A headless ComfyUI that other packs load into, and their nodes, called without a workflow."""

from __future__ import annotations

import asyncio
import io
import logging
import re
import sys
import types
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from ...errors import ReadoutGuidanceError
from ..workflow import load_extension

#: What a pack imports and its repository does not hold, by pack: left empty, so that the rest of the pack loads.
ABSENT = {"ComfyUI-Impact-Pack": ("impact.subpack_nodes",)}


def start_comfyui() -> str:
    """Make what packs take for granted: ComfyUI's server object, its extra nodes, this extension. Returns the version."""
    _take_utils()
    import comfyui_version
    import server

    import nodes

    server.PromptServer(asyncio.new_event_loop())
    asyncio.run(nodes.init_builtin_extra_nodes())
    load_extension()
    return comfyui_version.__version__


def _take_utils() -> None:
    """ComfyUI's own ``utils``, as its start does, before ``nodes`` puts a folder with another one first on the path."""
    import utils.install_util  # noqa: F401


def load_pack(path: Path) -> str:
    """Load a pack as ComfyUI's start does; returns what went wrong, "" if nothing did.

    Of a pack that this ComfyUI loads in part, the nodes of the modules that did load are added by their class names.
    """
    import nodes

    for name in ABSENT.get(path.name, ()):
        sys.modules.setdefault(name, types.ModuleType(name))
    kept = Kept()
    root = logging.getLogger()
    level = root.level
    root.addHandler(kept)
    root.setLevel(logging.INFO)
    try:
        with redirect_stdout(io.StringIO()):
            loaded = asyncio.run(nodes.load_custom_node(str(path), module_parent="custom_nodes"))
    finally:
        root.removeHandler(kept)
        root.setLevel(level)
    if loaded:
        return ""
    for module in modules_of(path):
        for node_id, node in {**_classes(module), **(getattr(module, "NODE_CLASS_MAPPINGS", None) or {})}.items():
            nodes.NODE_CLASS_MAPPINGS.setdefault(node_id, node)
    reasons = [line for line in kept.lines if "Error while" in line or "Cannot import" in line]
    reason = reasons[-1] if reasons else "no reason was given"
    return without_paths(reason.partition(": ")[2] or reason)


def without_paths(text: str) -> str:
    """A message with only the names of the files in it."""
    return re.sub(r"(?<![\w.])/(?:[^\s/'\"]+/)+", "", text)


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
    """Run a node with some of its inputs, the others at their defaults; its output, a tuple where it has more than one.

    class_type: its id, or several to choose the first that there is, ``a|b``.
    """
    out = _run(class_type, inputs)
    out = getattr(out, "result", out)
    if isinstance(out, dict):
        out = out["result"]
    return out[0] if isinstance(out, tuple) and len(out) == 1 else out


def run_graph(class_type: str, given: dict[str, Any], **inputs: Any) -> Any:
    """Run a node that expands into others, which are run as well. given: what would be linked to its inputs, by name."""
    out = _run(class_type, {**inputs, **{name: [name, 0] for name in given}})
    graph, done = out.expand, {name: (value,) for name, value in given.items()}

    def value(link: Any) -> Any:
        if not (isinstance(link, list) and len(link) == 2 and (link[0] in done or link[0] in graph)):
            return link
        if link[0] not in done:
            made = graph[link[0]]
            result = node(made["class_type"], **{name: value(each) for name, each in made["inputs"].items()})
            done[link[0]] = result if isinstance(result, tuple) else (result,)
        return done[link[0]][link[1]]

    results = tuple(value(link) for link in out.result)
    return results[0] if len(results) == 1 else results


def _run(class_type: str, inputs: dict[str, Any]) -> Any:
    import nodes

    found = next((nodes.NODE_CLASS_MAPPINGS[name] for name in class_type.split("|") if has_node(name)), None)
    if found is None:
        raise ReadoutGuidanceError(f"there is no node {class_type!r}")
    given = {**_defaults(found), **inputs}
    return found.execute(**given) if hasattr(found, "define_schema") else getattr(found(), found.FUNCTION)(**given)


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
