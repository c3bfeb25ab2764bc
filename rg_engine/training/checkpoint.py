"""Checkpoints of a training: written whole or not at all."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import torch

from ..errors import TrainingError

VERSION = 1


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` (tensors and plain values). Raises TrainingError if it can't; the file that was there stays."""
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"version": VERSION, **state}, partial)
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch's writer reports a full disk as a RuntimeError
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise TrainingError(
            f"the checkpoint {path.name!r} can't be written ({_first_line(error)}): free some space or choose another "
            f"folder. {'The one of before is still there' if path.exists() else 'Nothing was written'}"
        ) from error


def load_checkpoint(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The state in a checkpoint of a training with the same settings, None if there is none.

    Raises TrainingError if it is damaged, or was made with other settings.
    """
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's unpickler raises whatever a damaged file leads it to
        raise TrainingError(f"the checkpoint {path.name!r} can't be read: delete it to begin anew") from error
    if not isinstance(state, dict) or state.get("version") != VERSION or not isinstance(state.get("settings"), dict):
        raise TrainingError(f"{path.name!r} is no checkpoint of this version: delete it to begin anew")
    theirs = state["settings"]
    changed = [
        f"{key} {theirs.get(key)!r} then, {value!r} now" for key, value in settings.items() if theirs.get(key) != value
    ]
    if changed:
        raise TrainingError(
            f"the checkpoint {path.name!r} belongs to another training ({'; '.join(changed[:3])}): delete it to "
            "begin anew, or go on with its settings"
        )
    return state


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
