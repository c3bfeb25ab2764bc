"""Head files from one layout to the other, without loss."""

from __future__ import annotations

from pathlib import Path

import torch

from .errors import HeadFileError
from .heads import load_head, save_head, to_authors_layout
from .types import HEAD_KINDS, HeadKind


def convert_head(source: Path, target: Path, kind: HeadKind | None = None) -> None:
    """Read ``source`` and write ``target``; the endings (.pt, .safetensors) choose the layouts."""
    if kind is not None and kind not in HEAD_KINDS:
        raise HeadFileError(f"kind {kind!r} is unknown: expected one of {', '.join(HEAD_KINDS)}")
    head = load_head(source, kind)
    if target.suffix == ".safetensors":
        save_head(head, target)
    elif target.suffix == ".pt":
        torch.save(to_authors_layout(head), target)
    else:
        raise HeadFileError(f"{target.name!r} ends in neither .safetensors nor .pt: choose one of them")
