"""The model folder ``readout_heads``: ``models/readout_heads``, the user's extra paths, and the heads of the demo model."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

import folder_paths
from safetensors import SafetensorError

from ..demo import DEMO_HEADS
from ..errors import HeadFileError, OptimizationError, ReadoutGuidanceError
from ..heads import ReadoutHead, load_head, save_head
from ..optimization.files import EXTENSIONS as LOSS_EXTENSIONS
from ..types import HeadKind

FOLDER = "readout_heads"
EXTENSIONS = {".safetensors", ".pt"}
LossFolder = Literal["aesthetic_heads", "classifiers"]
#: Orthogonal adapters, ComfyUI's LoRAs after them.
OFT_FOLDERS = ("oft", "loras")
OFT_EXTENSIONS = {".safetensors", ".bin", ".ckpt", ".pt", ".pth"}


def register_folders() -> None:
    """Tell ComfyUI where heads and adapters live. Safe to call more than once."""
    folder_paths.add_model_folder_path(FOLDER, str(DEMO_HEADS))
    register_folder(FOLDER, EXTENSIONS)
    register_folder(OFT_FOLDERS[0], OFT_EXTENSIONS)
    for folder in get_args(LossFolder):
        register_folder(folder, LOSS_EXTENSIONS, made=False)


def register_folder(folder: str, extensions: set[str], made: bool = True) -> None:
    """Tell ComfyUI of ``models/<folder>`` and what its files end in; it is made, unless not ``made``."""
    home = os.path.join(folder_paths.models_dir, folder)
    if made:
        with contextlib.suppress(OSError):  # a read-only installation does without
            os.makedirs(home, exist_ok=True)
    folder_paths.add_model_folder_path(folder, home, is_default=True)
    paths, _ = folder_paths.folder_names_and_paths[folder]
    folder_paths.folder_names_and_paths[folder] = (paths, extensions)


def loss_files(folder: LossFolder) -> list[str]:
    return folder_paths.get_filename_list(folder)


def find_loss_file(folder: LossFolder, name: str) -> str:
    """The path of an aesthetic head or a classifier by its name in the list. Raises OptimizationError for anything else."""
    if name not in loss_files(folder):
        raise OptimizationError(
            f"there is no file named {name!r} in models/{folder}: put it there, refresh, and choose it by its name"
        )
    return folder_paths.get_full_path_or_raise(folder, name)


def loss_file_version(folder: LossFolder, name: str) -> str:
    """Changes when the file does."""
    return file_version(find_loss_file(folder, name))


def head_names() -> list[str]:
    return folder_paths.get_filename_list(FOLDER)


def find_head(name: str) -> str:
    """The path of a head by its name in the list. Raises HeadFileError for anything else, paths included."""
    return find_file(FOLDER, name, "head", HeadFileError)


def find_file(folder: str, name: str, what: str, error: type[ReadoutGuidanceError]) -> str:
    """The path of a file in a model folder by its name in the list. Raises ``error`` for anything else, paths included;
    what: the file is, in words."""
    names = folder_paths.get_filename_list(folder)
    if name not in names:
        listed = ", ".join(names[:8]) or "it is empty"
        raise error(
            f"there is no {what} named {name!r} in models/{folder} ({listed}): put the file there, refresh, and choose it "
            "by its name, not by a path"
        )
    path = folder_paths.get_full_path_or_raise(folder, name)
    if not is_inside(path, folder):
        raise error(f"{what} {name!r} lies outside models/{folder}: copy it there")
    return path


def is_inside(path: str, folder: str) -> bool:
    """A link inside the folder may point elsewhere on purpose; what is refused is a name that climbs out."""
    roots = [Path(root).resolve() for root in folder_paths.get_folder_paths(folder)]
    return any(
        Path(os.path.normpath(path)).is_relative_to(root) or Path(path).resolve().is_relative_to(root) for root in roots
    )


def head_version(name: str) -> str:
    """Changes when the file does."""
    return file_version(find_head(name))


def file_version(path: str) -> str:
    """Changes when the file does."""
    return f"{path} {os.path.getmtime(path)} {os.path.getsize(path)}"


def load_named_head(name: str, kind: HeadKind | None = None) -> ReadoutHead:
    return load_head(find_head(name), kind, name)


def save_named_head(head: ReadoutHead, name: str, overwrite: bool = False) -> str:
    """Save a head into ``models/readout_heads``; returns its name in the list, numbered if that one is taken.

    Raises HeadFileError for a name that is no plain file name, and if the disk does not take it.
    """
    stem = plain_name(name.removesuffix(".safetensors"))
    return save_file(FOLDER, stem, overwrite, lambda path: save_head(head, path), "head", HeadFileError)


def save_file(
    folder: str, stem: str, overwrite: bool, save: Callable[[Path], None], what: str, error: type[ReadoutGuidanceError]
) -> str:
    """Save a ``.safetensors`` into a model folder, whole or not at all; returns its name in the list, numbered if that one
    is taken. Raises ``error`` if the disk does not take it."""
    home, number = Path(folder_paths.get_folder_paths(folder)[0]), 2
    path = home / f"{stem}.safetensors"
    while path.exists() and not overwrite:
        path, number = home / f"{stem}_{number}.safetensors", number + 1
    partial = path.with_suffix(".partial")
    try:
        home.mkdir(parents=True, exist_ok=True)
        save(partial)
        os.replace(partial, path)
    except (OSError, SafetensorError) as failed:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise error(f"{what} {path.name!r} can't be written ({failed}): free some space in models/{folder}") from failed
    return path.name


def checkpoint_path(name: str, folder: str = FOLDER) -> Path:
    """Where the checkpoint of a training of that name is. Raises HeadFileError for a name that is no plain file name."""
    return Path(folder_paths.get_output_directory()) / folder / f"{plain_name(name)}.checkpoint"


def plain_name(name: str) -> str:
    stem = name.strip()
    if not re.fullmatch(r"[^\s./\\:*?\"<>|\x00-\x1f][^/\\:*?\"<>|\x00-\x1f]{0,99}", stem) or stem.endswith("."):
        raise HeadFileError(f"{name!r} is no file name: give letters, digits, spaces, - and _, without folders")
    return stem
