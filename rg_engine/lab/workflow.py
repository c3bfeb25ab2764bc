"""Runs workflow files headlessly: the page's JSON to prompts that ComfyUI executes, in this process."""

from __future__ import annotations

import asyncio
import copy
import inspect
import json
from pathlib import Path
from typing import Any

from ..comfy_host.bootstrap import REPOSITORY
from ..errors import ReadoutGuidanceError

Prompt = dict[str, dict[str, Any]]
#: What the page stores after a seed.
AFTER_GENERATE = ("fixed", "increment", "decrement", "randomize")


def load_extension() -> None:
    """Load this extension into this process, as ComfyUI's start does (ComfyUI's core nodes come with ``nodes``)."""
    import nodes

    if "RG_LoadReadoutHead" not in nodes.NODE_CLASS_MAPPINGS:
        _load(REPOSITORY, "custom_nodes")


def load_comfyui_nodes(file: str) -> None:
    """Load a file of ComfyUI's extra nodes into this process, as its start does."""
    import nodes

    _load(Path(nodes.__file__).parent / "comfy_extras" / file, "comfy_extras")


def _load(path: Path, module_parent: str) -> None:
    import nodes

    if not asyncio.run(nodes.load_custom_node(str(path), module_parent=module_parent)):
        raise ReadoutGuidanceError(f"ComfyUI could not load {path.name}: see the messages above")


def to_prompt(workflow: dict[str, Any], node_inputs: Any) -> Prompt:
    """A workflow as the page saves it, as a prompt for ``/prompt``.

    Args: node_inputs(class_type) gives the node's INPUT_TYPES dictionary. Notes and muted nodes are left out.
    """
    links = {link[0]: (str(link[1]), link[2]) for link in workflow["links"]}
    prompt: Prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in ("Note", "MarkdownNote") or node.get("mode", 0) in (2, 4):
            continue
        values = list(node.get("widgets_values", []))
        inputs: dict[str, Any] = {}
        linked = {slot["name"]: links[slot["link"]] for slot in node.get("inputs", []) if slot.get("link") is not None}
        types = node_inputs(node["type"])
        for name, spec in {**types.get("required", {}), **types.get("optional", {})}.items():
            options = spec[1] if len(spec) > 1 else {}
            if _is_widget(spec):
                if not values:  # saved before the node had this input
                    if "default" in options:
                        inputs[name] = options["default"]
                    continue
                inputs[name] = values.pop(0)
                seeded = options.get("control_after_generate") or name in ("seed", "noise_seed")
                if seeded and values and values[0] in AFTER_GENERATE:
                    values.pop(0)
            if name in linked:
                inputs[name] = list(linked[name])
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def node_inputs(class_type: str) -> dict[str, Any]:
    """INPUT_TYPES of a loaded node."""
    import nodes

    if class_type not in nodes.NODE_CLASS_MAPPINGS:
        raise ReadoutGuidanceError(f"the workflow uses the node {class_type!r}, which is not installed")
    return nodes.NODE_CLASS_MAPPINGS[class_type].INPUT_TYPES()


def read_workflow(path: Path) -> Prompt:
    return to_prompt(json.loads(path.read_text(encoding="utf-8")), node_inputs)


def with_inputs(prompt: Prompt, class_type: str, **inputs: Any) -> Prompt:
    """A copy of ``prompt`` with inputs of every node of a class replaced."""
    changed = copy.deepcopy(prompt)
    for node in changed.values():
        if node["class_type"] == class_type:
            node["inputs"].update(inputs)
    return changed


def _is_widget(spec: Any) -> bool:
    kind, options = spec[0], spec[1] if len(spec) > 1 else {}
    return (isinstance(kind, (list, tuple)) or kind in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")) and not options.get(
        "forceInput"
    )


class Executor:
    """ComfyUI's PromptExecutor without a server; pictures given to PreviewImage and SaveImage are kept, by node."""

    def __init__(self) -> None:
        import execution

        takes = inspect.signature(execution.PromptExecutor).parameters
        limits = {"lru": 0, "ram": 4.0, "ram_inactive": 4.0}  # for a classic cache; named so since 0.3.70
        self._executor = execution.PromptExecutor(_Silent(), **({"cache_args": limits} if "cache_args" in takes else {}))
        self._count = 0

    def run(self, prompt: Prompt) -> dict[str, Any]:
        """Execute; returns the outputs that the page would show, by node id. Raises ReadoutGuidanceError if it failed."""
        import execution

        self._count += 1
        validate = execution.validate_prompt
        accepts_id = len(inspect.signature(validate).parameters) > 1
        answer = asyncio.run(validate(str(self._count), prompt, None)) if accepts_id else validate(prompt)
        valid, error, outputs, node_errors = answer
        if not valid:
            raise ReadoutGuidanceError(f"ComfyUI does not accept the workflow: {error} {node_errors}")
        self._executor.execute(prompt, str(self._count), {}, outputs)
        if not self._executor.success:
            failed = [data for event, data in self._executor.status_messages if event == "execution_error"]
            message = failed[0].get("exception_message", "") if failed else "it was interrupted"
            raise ReadoutGuidanceError(f"the workflow failed: {message}")
        return self._executor.history_result["outputs"]


class _Silent:
    """What PromptExecutor needs of a server, when nobody is listening."""

    client_id = None
    last_node_id = None
    last_prompt_id = None

    def send_sync(self, event: str, data: Any, sid: Any = None) -> None:
        pass
