"""The embedded files, as the weights of modules."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ...errors import ModelWorldError


def load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelWorldError(
            f"the demo model's file {path.name} is missing or damaged ({error}): install the extension again"
        ) from error


def fill(module: nn.Module, state: dict[str, Tensor], prefix: str, path: Path) -> None:
    wanted = {key[len(prefix) :]: value.float() for key, value in state.items() if key.startswith(prefix)}
    try:
        module.load_state_dict(wanted)
    except RuntimeError as error:
        raise ModelWorldError(f"the demo model's file {path.name} does not fit this version: {error}") from error
