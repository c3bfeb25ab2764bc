"""The model folder ``readout_boundaries``: ``models/readout_boundaries`` and the user's extra paths."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import folder_paths
from safetensors import SafetensorError

from ..boundaries import Boundary, load_boundary, save_boundary
from ..errors import BoundaryError, HeadFileError
from .folders import plain_name

FOLDER = "readout_boundaries"


def register_boundary_folder() -> None:
    """Tell ComfyUI where boundaries live. Safe to call more than once."""
    home = os.path.join(folder_paths.models_dir, FOLDER)
    with contextlib.suppress(OSError):  # a read-only installation does without
        os.makedirs(home, exist_ok=True)
    folder_paths.add_model_folder_path(FOLDER, home, is_default=True)
    paths, _ = folder_paths.folder_names_and_paths[FOLDER]
    folder_paths.folder_names_and_paths[FOLDER] = (paths, {".safetensors"})


def boundary_names() -> list[str]:
    return folder_paths.get_filename_list(FOLDER)


def find_boundary(name: str) -> str:
    """The path of a boundary by its name in the list. Raises BoundaryError for anything else, paths included."""
    if name not in boundary_names():
        listed = ", ".join(boundary_names()[:8]) or "it is empty"
        raise BoundaryError(
            f"there is no boundary named {name!r} in models/{FOLDER} ({listed}): put the file there, refresh, and choose "
            f"it by "
            "its name, not by a path"
        )
    path = folder_paths.get_full_path_or_raise(FOLDER, name)
    roots = [Path(root).resolve() for root in folder_paths.get_folder_paths(FOLDER)]
    # A link inside the folder may point elsewhere on purpose; what is refused is a name that climbs out.
    if not any(
        Path(os.path.normpath(path)).is_relative_to(root) or Path(path).resolve().is_relative_to(root) for root in roots
    ):
        raise BoundaryError(f"boundary {name!r} lies outside models/{FOLDER}: copy it there")
    return path


def boundary_version(name: str) -> str:
    """Changes when the file does."""
    path = find_boundary(name)
    return f"{path} {os.path.getmtime(path)} {os.path.getsize(path)}"


def load_named_boundary(name: str) -> Boundary:
    return load_boundary(find_boundary(name), name)


def save_named_boundary(boundary: Boundary, name: str, overwrite: bool = False) -> str:
    """Save a boundary into ``models/readout_boundaries``; returns its name in the list, numbered if that one is taken.

    Raises BoundaryError for a name that is no plain file name, and if the disk does not take it.
    """
    try:
        stem = plain_name(name.removesuffix(".safetensors"))
    except HeadFileError as error:
        raise BoundaryError(str(error)) from error
    folder, number = Path(folder_paths.get_folder_paths(FOLDER)[0]), 2
    path = folder / f"{stem}.safetensors"
    while path.exists() and not overwrite:
        path, number = folder / f"{stem}_{number}.safetensors", number + 1
    partial = path.with_suffix(".partial")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_boundary(boundary, partial)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise BoundaryError(
            f"boundary {path.name!r} can't be written ({error}): free some space in models/{FOLDER}"
        ) from error
    return path.name
