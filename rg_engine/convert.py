"""Head files from one layout to the other, without loss."""

from __future__ import annotations

from pathlib import Path

from .errors import HeadFileError
from .heads import convert_authors, convert_to_authors, load_head, save_head
from .types import HEAD_KINDS, HeadKind


def convert_head(source: Path, target: Path, kind: HeadKind | None = None) -> None:
    """Read ``source`` and write ``target``; the endings (.pt, .safetensors) choose the layouts.

    From an authors' .pt to .safetensors and back, tensors, config and step are the same.
    """
    if kind is not None and kind not in HEAD_KINDS:
        raise HeadFileError(f"kind {kind!r} is unknown: expected one of {', '.join(HEAD_KINDS)}")
    if not target.absolute().parent.is_dir():
        raise HeadFileError(f"there is no folder {str(target.parent)!r} to write {target.name!r} to")
    match source.suffix, target.suffix:
        case ".safetensors", ".safetensors":
            save_head(load_head(source, kind), target)
        case _, ".safetensors":
            convert_authors(source, target, kind)
        case ".safetensors", ".pt":
            convert_to_authors(source, target, kind)
        case _, ".pt":
            raise HeadFileError(f"{source.name!r} is an authors' file already: only a .safetensors becomes a .pt")
        case _:
            raise HeadFileError(f"{target.name!r} ends in neither .safetensors nor .pt: choose one of them")
