"""The floor plan and the rules of shipped code, read from its syntax."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted([ROOT / "__init__.py", *(ROOT / "nodes").rglob("*.py"), *(ROOT / "rg_engine").rglob("*.py")])

#: Imports run downward only, or stay inside a folder. A new folder gets its floor here; the wings of comfy_host have floors
#: of their own, above what stands beside them.
FLOORS = {
    "errors": 0, "version": 0, "types": 1, "chart": 1,
    "features": 2, "heads": 2, "losses": 2,
    "guidance": 3, "training": 3, "boundaries": 3, "demo": 3, "optimization": 3, "adapters": 3.1,
    "comfy_host": 4, "comfy_host.demo_model": 4.1,
    "comfy_host.loaded": 4.1, "comfy_host.edits": 4.2, "comfy_host.guided": 4.3, "comfy_host.training": 4.3,
    "comfy_host.optimized": 4.4, "comfy_host.adapters": 4.4,
    "convert": 5, "nodes": 5, "lab": 5,
    "__main__": 6, "__init__": 6,
}  # fmt: skip
WINGED = {"comfy_host"}
MOST_FILES = 12
COMFYUI = {
    "comfy",
    "comfy_api",
    "comfy_execution",
    "comfy_extras",
    "execution",
    "folder_paths",
    "latent_preview",
    "nodes",
    "server",
}
MAY_IMPORT_COMFYUI = {"comfy_host", "lab", "nodes", "__init__"}
FORBIDDEN_MODULES = {"importlib", "subprocess", "socket", "urllib", "http", "requests", "ctypes", "runpy"}
FORBIDDEN_CALLS = {"exec", "eval", "compile", "__import__", "pickle.load", "pickle.loads", "pickle.Unpickler"}
NODE_STATEMENTS = 25


@pytest.fixture(params=FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def path(request) -> Path:
    return request.param


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def place(module: tuple[str, ...]) -> str:
    """The part of the plan that a module (its path from the root, without .py) belongs to."""
    if module[0] != "rg_engine" or len(module) == 1:
        return module[0]
    winged = module[1] in WINGED and len(module) > 2 and (ROOT / "rg_engine" / module[1] / module[2]).is_dir()
    return ".".join(module[1:3]) if winged else module[1]


def own_place(path: Path) -> str:
    return place(path.relative_to(ROOT).with_suffix("").parts)


def relative_imports(path: Path) -> Iterator[tuple[str, ...]]:
    """Modules of this extension that a file imports, as paths from the root."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = path.relative_to(ROOT).parts[: -node.level]
            target = base + tuple(node.module.split(".") if node.module else ())
            if target in ((), ("rg_engine",)):  # from . import x: the names are the modules
                yield from ((*target, alias.name) for alias in node.names)
            else:
                yield target


def absolute_imports(tree: ast.AST) -> Iterator[str]:
    """Top-level packages that a file imports by name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield node.module.split(".")[0]


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Calls in a file and what they call, as written."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_imports_run_downward_or_stay_inside_a_folder(path):
    own = own_place(path)
    upward = [
        ".".join(module)
        for module in relative_imports(path)
        if place(module) != own and FLOORS[place(module)] >= FLOORS[own]
    ]
    assert not upward


def test_no_folder_of_the_engine_is_a_hall():
    folders = [ROOT / "rg_engine", *(path for path in (ROOT / "rg_engine").rglob("*") if path.is_dir())]
    assert not [folder for folder in folders if len(list(folder.glob("*.py"))) > MOST_FILES]


def test_the_engine_is_imported_relatively_only(path):
    """ComfyUI loads the extension under a name of its own."""
    assert "rg_engine" not in set(absolute_imports(parse(path)))


def test_only_the_host_and_the_nodes_import_comfyui(path):
    if own_place(path).partition(".")[0] not in MAY_IMPORT_COMFYUI:
        assert not set(absolute_imports(parse(path))) & COMFYUI


def test_importing_the_extension_imports_the_standard_library_only():
    """Tests and users of the engine need no ComfyUI."""
    body = [node for node in parse(ROOT / "__init__.py").body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert not [node for node in body if isinstance(node, ast.ImportFrom)]
    assert {alias.name for node in body for alias in node.names} <= sys.stdlib_module_names


def test_shipped_code_starts_no_processes_opens_no_sockets_and_runs_no_text(path):
    assert not set(absolute_imports(parse(path))) & FORBIDDEN_MODULES
    assert not [name for name, _ in calls(path) if name in FORBIDDEN_CALLS]


def test_files_are_loaded_without_running_code_in_them(path):
    def told(call: ast.Call, keyword: str) -> object:
        return next((ast.unparse(k.value) for k in call.keywords if k.arg == keyword), None)

    for name, call in calls(path):
        if name == "torch.load":
            assert told(call, "weights_only") == "True"
        if name in ("np.load", "numpy.load"):
            assert told(call, "allow_pickle") in (None, "False")


def test_the_device_is_never_chosen_by_name_of_a_vendor(path):
    assert not [name for name, _ in calls(path) if name.endswith(".cuda")]


def test_functions_of_node_files_are_short():
    long = {}
    for path in (ROOT / "nodes").rglob("*.py"):
        for function in ast.walk(parse(path)):
            if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
                count = sum(isinstance(node, ast.stmt) for node in ast.walk(function)) - 1
                if count > NODE_STATEMENTS:
                    long[f"{path.name}: {function.name}"] = count
    assert not long
