"""Tensors of a loss's file, without running anything in it."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import OptimizationError

EXTENSIONS = {".safetensors", ".pth", ".pt"}
_WRAPPERS = ("state_dict", "model_state_dict", "model")  # what training scripts keep the tensors under
_PREFIXES = ("module.", "model.")


@torch.inference_mode(False)
def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A file's tensors by key, and its metadata (.safetensors only).

    Raises OptimizationError for a file that is missing, damaged, holds a program (TorchScript, .pt2, ONNX), or anything
    but tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise OptimizationError(f"there is no file {path.name!r}: put it into its model folder and refresh the list")
    if path.suffix not in EXTENSIONS:
        raise OptimizationError(
            f"{path.name!r} is no .safetensors, .pth or .pt: give the tensors (a state_dict) of the network, not an "
            "exported program (ONNX, .pt2, TorchScript)"
        )
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError) as error:
            raise OptimizationError(f"{path.name!r} is damaged or no .safetensors ({error})") from error
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if any(name.endswith("constants.pkl") or "/code/" in name or "archive_format" in name for name in names):
            raise OptimizationError(
                f"{path.name!r} is a program (TorchScript or an export) and was not opened: save the network's state_dict "
                "as .safetensors instead"
            )
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise OptimizationError(
            f"{path.name!r} holds something other than tensors and plain values and was not opened: it may run code. Save "
            "the network's state_dict instead"
        ) from error
    except Exception as error:  # torch's unpickler raises whatever a damaged file leads it to
        raise OptimizationError(f"{path.name!r} can't be read: it is truncated or no PyTorch file") from error
    return _tensors_in(loaded, path.name), {}


def _tensors_in(loaded: Any, name: str) -> dict[str, Tensor]:
    for wrapper in _WRAPPERS:
        if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
    found = {key: value for key, value in loaded.items() if isinstance(value, Tensor)} if isinstance(loaded, dict) else {}
    if not found:
        raise OptimizationError(f"{name!r} holds no tensors by name: give a network's state_dict")
    for prefix in _PREFIXES:
        if all(str(key).startswith(prefix) for key in found):
            found = {str(key)[len(prefix) :]: value for key, value in found.items()}
    return found
