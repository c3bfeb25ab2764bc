"""Adapter files by name: ``models/oft``, then ``models/loras``."""

from __future__ import annotations

import os

import folder_paths

from ...errors import AdapterError
from ..folders import OFT_FOLDERS, file_version, is_inside

NONE = "none"


def adapter_names() -> list[str]:
    """``none``, then the names in both folders."""
    return [NONE, *dict.fromkeys(name for folder in OFT_FOLDERS for name in folder_paths.get_filename_list(folder))]


def find_adapter(name: str) -> str:
    """The path of an adapter by its name in the list. Raises AdapterError for anything else, paths included."""
    for folder in OFT_FOLDERS:
        if name not in folder_paths.get_filename_list(folder):
            continue
        path = folder_paths.get_full_path_or_raise(folder, name)
        if not is_inside(path, folder):
            raise AdapterError(f"{name!r} lies outside models/{folder}: copy it there")
        return path
    raise AdapterError(
        f"there is no adapter named {name!r} in models/oft or models/loras: put the file there, refresh, and choose it by "
        "its name, not by a path"
    )


def adapter_version(name: str) -> str:
    """Changes when the file does, or PEFT's settings beside it."""
    path = find_adapter(name)
    beside = os.path.join(os.path.dirname(path), "adapter_config.json")
    return " ".join(file_version(each) for each in (path, beside) if os.path.isfile(each))
