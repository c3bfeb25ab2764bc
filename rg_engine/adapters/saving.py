"""Writes adapters: exactly, or not at all."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..errors import AdapterError
from .adapter import Adapter, Named
from .layouts import authors, lycoris, native, onetrainer, peft

Format = Literal["native", "authors", "PEFT", "OneTrainer", "LyCORIS", "difference"]
FORMATS: tuple[Format, ...] = get_args(Format)
PEFT_FILES = ("adapter_model.safetensors", "adapter_config.json")
WRITERS = {"authors": authors.write, "OneTrainer": onetrainer.write, "LyCORIS": lycoris.write}


def save_native(adapter: Adapter, path: Path, dtype: torch.dtype = torch.float32) -> None:
    tensors, metadata = native.write(adapter, dtype)
    write_tensors(path, tensors, metadata)


def save_as(layers: Sequence[Named], form: Format, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """path: a file, a folder for PEFT. Raises AdapterError if it can't be written exactly, or the disk does not take it."""
    if form == "PEFT":
        tensors, config = peft.write(layers)
        write_tensors(path / PEFT_FILES[0], _cast(tensors, dtype), {"format": "pt"})
        try:
            (path / PEFT_FILES[1]).write_text(json.dumps(config, indent=2), encoding="utf-8")
        except OSError as error:
            raise AdapterError(f"{PEFT_FILES[1]} can't be written ({error})") from error
    else:
        write_tensors(path, _cast(WRITERS[form](layers), dtype), {"format": "pt"})


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Whole or not at all. Raises AdapterError if the disk does not take it; a file that was there stays."""
    partial = path.with_name(path.name + ".partial")
    state = {key: value.detach().to("cpu", copy=True).contiguous() for key, value in tensors.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(state, str(partial), metadata=dict(metadata))
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise AdapterError(
            f"adapter {path.name!r} can't be written ({error}): free some space in {path.parent.name}"
        ) from error


def _cast(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in tensors.items()}
