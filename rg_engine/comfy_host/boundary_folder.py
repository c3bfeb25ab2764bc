"""The model folder ``readout_boundaries``: ``models/readout_boundaries`` and the user's extra paths."""

from __future__ import annotations

import folder_paths

from ..boundaries import Boundary, load_boundary, save_boundary
from ..errors import BoundaryError, HeadFileError
from .folders import file_version, find_file, plain_name, register_folder, save_file

FOLDER = "readout_boundaries"


def register_boundary_folder() -> None:
    """Tell ComfyUI where boundaries live. Safe to call more than once."""
    register_folder(FOLDER, {".safetensors"})


def boundary_names() -> list[str]:
    return folder_paths.get_filename_list(FOLDER)


def find_boundary(name: str) -> str:
    """The path of a boundary by its name in the list. Raises BoundaryError for anything else, paths included."""
    return find_file(FOLDER, name, "boundary", BoundaryError)


def boundary_version(name: str) -> str:
    """Changes when the file does."""
    return file_version(find_boundary(name))


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
    return save_file(FOLDER, stem, overwrite, lambda path: save_boundary(boundary, path), "boundary", BoundaryError)
