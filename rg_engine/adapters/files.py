"""Adapter files: opened as tensors only, recognised by their keys, never by name or shape."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import AdapterError
from .adapter import Adapter, Contents, ReadOptions
from .layouts import LAYOUTS

LORA = ("lora_up", "lora_down", "lora_A", "lora_B", "lora.up", "lora.down", "hada_w", "lokr_w")


@torch.inference_mode(False)  # ComfyUI runs nodes in inference mode; these numbers may be trained on
def load_adapter(path: str | Path, options: ReadOptions | None = None, name: str | None = None) -> Adapter:
    """What an adapter file means. Raises AdapterError if it is missing, damaged, unsafe, unknown, or not whole."""
    path = Path(path)
    return read_adapter(read_contents(path, name or path.name), options or ReadOptions())


def read_adapter(contents: Contents, options: ReadOptions) -> Adapter:
    found = {layout.name: layout for layout in LAYOUTS for key in contents.tensors if layout.claims(key)}
    if not found:
        some = ", ".join(list(contents.tensors)[:3]) or "nothing"
        lora = any(part in key for key in contents.tensors for part in LORA)
        raise AdapterError(
            f"{contents.name!r} is no orthogonal adapter: it holds {some}, "
            f"...{' That is a LoRA: use Load LoRA' if lora else ''}"
        )
    if len(found) > 1:
        raise AdapterError(
            f"{contents.name!r} holds two layouts at once, {' and '.join(found)}: it was put together wrongly"
        )
    return next(iter(found.values())).read(contents, options)


def read_contents(path: Path, name: str) -> Contents:
    """Tensors, metadata, and the adapter_config.json that PEFT writes beside its files."""
    if not path.is_file():
        raise AdapterError(f"there is no file {name!r}: put it into models/oft or models/loras and refresh the list")
    tensors, metadata = _safetensors(path, name) if path.suffix == ".safetensors" else (_pickled(path, name), {})
    return Contents(name=name, tensors=tensors, metadata=metadata, config=_config(path, name))


def _safetensors(path: Path, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{name!r} can't be read: it is truncated or no safetensors file ({error})") from error


def _pickled(path: Path, name: str) -> dict[str, Tensor]:
    try:
        raw: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's unpickler raises whatever a damaged file leads it to
        raise AdapterError(
            f"{name!r} was not opened: it is truncated, or holds more than tensors and plain values, which may be code"
        ) from error
    raw = raw.get("state_dict", raw) if isinstance(raw, dict) else None
    if not isinstance(raw, dict):
        raise AdapterError(f"{name!r} holds no table of tensors")
    return {str(key): value for key, value in raw.items() if isinstance(value, Tensor)}


def _config(path: Path, name: str) -> dict[str, Any] | None:
    config = path.with_name("adapter_config.json")
    if not config.is_file():
        return None
    try:
        read = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(f"adapter_config.json beside {name!r} can't be read: {error}") from error
    if not isinstance(read, dict):
        raise AdapterError(f"adapter_config.json beside {name!r} is no table of settings")
    return read
