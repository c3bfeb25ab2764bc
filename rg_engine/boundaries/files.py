"""Boundary files: ``.safetensors``, a tensor for each part's normal, the rest as JSON in the metadata."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import BoundaryError
from .boundary import Boundary, Part

FORMAT_VERSION = "1"
METADATA_KEY = "readout_boundary"
SUFFIX = ".normal"


def save_boundary(boundary: Boundary, path: str | Path) -> None:
    """Write a boundary with what it was fitted on."""
    facts = {field.name: getattr(boundary, field.name) for field in dataclasses.fields(boundary) if field.name != "parts"}
    parts = {part.space: {"middle": part.middle, "gap": part.gap} for part in boundary.parts}
    tensors = {part.space + SUFFIX: part.normal.detach().to("cpu", copy=True).contiguous() for part in boundary.parts}
    described = json.dumps({"format_version": FORMAT_VERSION, **facts, "parts": parts}, sort_keys=True)
    save_file(tensors, str(path), metadata={METADATA_KEY: described})


def load_boundary(path: str | Path, name: str | None = None) -> Boundary:
    """Read a boundary. Raises BoundaryError if the file is missing, damaged, or none."""
    path = Path(path)
    name = name or path.name
    if path.suffix != ".safetensors":
        raise BoundaryError(f"{name!r} is no .safetensors file: boundaries are such files only, which hold no code")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise BoundaryError(f"{name!r} can't be read: it is missing, truncated or no safetensors file ({error})") from error
    if METADATA_KEY not in metadata:
        some = ", ".join(sorted(tensors)[:4]) or "nothing"
        raise BoundaryError(
            f"{name!r} is not a boundary: it holds {some} and no {METADATA_KEY}. Choose one of Save Boundary's"
        )
    try:
        return _built(json.loads(metadata[METADATA_KEY]), tensors, name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, BoundaryError):
            raise
        raise BoundaryError(f"{name!r} has damaged metadata: {error!r}. Fit the boundary again") from error


def _built(described: dict[str, Any], tensors: dict[str, Any], name: str) -> Boundary:
    version = described.pop("format_version")
    if version != FORMAT_VERSION:
        raise BoundaryError(f"{name!r} has boundary format {version}; this version reads {FORMAT_VERSION}: update it")
    facts = described.pop("parts")
    parts = [
        Part(space=space, normal=tensors[space + SUFFIX].float(), middle=float(each["middle"]), gap=float(each["gap"]))
        for space, each in sorted(facts.items(), reverse=True)  # z before h
    ]
    described["latent_shape"] = tuple(int(size) for size in described["latent_shape"])
    return Boundary(parts=tuple(parts), **described)
