"""This project's own: triangles of skew blocks, in the convention of :class:`Rotation`; its metadata says the rest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import AdapterError
from ..adapter import Adapter, Contents, Layer, Layout, ReadOptions
from ..orthogonal import from_triangle, triangle
from ..rotation import Rotation
from .comfyui import ADDED

METADATA_KEY = "readout_guidance_oft"
VERSION = 1
TRIANGLE, MAGNITUDES, HINT = ".oft_triangle", ".oft_magnitudes", "oft_hint."


def read(contents: Contents, options: ReadOptions) -> Adapter:
    try:
        described = json.loads(contents.metadata[METADATA_KEY])
        version, told, facts = described["version"], described["layers"], dict(described["facts"])
    except (KeyError, ValueError, TypeError) as error:
        raise AdapterError(
            f"{contents.name!r} has lost its metadata ({METADATA_KEY}), without which it can't be read"
        ) from error
    if version != VERSION:
        raise AdapterError(
            f"{contents.name!r} has OFT format {version}; this version reads {VERSION}: update this extension"
        )
    beside = {key: value for key, value in contents.tensors.items() if key.endswith(ADDED) or key.startswith(HINT)}
    layers = []
    for key, entry in told.items():
        try:
            rotation = _rotation(contents, key, dict(entry))
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, AdapterError):
                raise
            raise AdapterError(
                f"{contents.name!r} is damaged: {key} is not as its metadata describes it ({error})"
            ) from error
        layers.append(Layer(key=key.partition("#")[0], rotation=rotation))
    return Adapter(
        layout=LAYOUT.name, layers=tuple(layers), facts=facts,
        added={key: value.float() for key, value in beside.items() if not key.startswith(HINT)},
        hint={key.removeprefix(HINT): value.float() for key, value in beside.items() if key.startswith(HINT)},
        notes=(f"coft_eps {options.coft_eps:g} is not used: a native file holds what is used",) if options.coft_eps else (),
    )  # fmt: skip


def write(adapter: Adapter, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata; exact for every adapter in fp32."""
    tensors: dict[str, Tensor] = {key: value.to(dtype) for key, value in adapter.added.items()}
    tensors |= {HINT + key: value.to(dtype) for key, value in adapter.hint.items()}
    told: dict[str, Any] = {}
    for layer in adapter.layers:
        rotation = layer.rotation
        key = layer.key if rotation.rows is None else f"{layer.key}#{rotation.rows[0]}"
        told[key] = _described(rotation)
        tensors[key + TRIANGLE] = triangle(rotation.q).to(dtype)
        if rotation.magnitudes is not None:
            tensors[key + MAGNITUDES] = rotation.magnitudes.to(dtype)
    described = {"version": VERSION, "layers": told, "facts": dict(adapter.facts)}
    return tensors, {METADATA_KEY: json.dumps(described, sort_keys=True)}


def _described(rotation: Rotation) -> dict[str, Any]:
    """Side and block size, and what is not as usual."""
    entry: dict[str, Any] = {"side": rotation.side, "block_size": rotation.block_size}
    for name in ("shared", "series", "rows", "convolutions_back"):
        if getattr(rotation, name):
            entry[name] = getattr(rotation, name)
    return entry


def _rotation(contents: Contents, key: str, entry: Mapping[str, Any]) -> Rotation:
    v, b, magnitudes = (
        contents.tensors[key + TRIANGLE].float(),
        int(entry["block_size"]),
        contents.tensors.get(key + MAGNITUDES),
    )
    if entry["side"] not in ("in", "out", "memory") or v.shape[-1] != b * (b - 1) // 2 or v.ndim not in (2, 3):
        raise ValueError(f"side {entry['side']!r}, triangles {tuple(v.shape)} of blocks of {b}")
    rows = entry.get("rows")
    return Rotation(
        q=from_triangle(v, b), side=entry["side"], shared=bool(entry.get("shared")),
        series=tuple(float(c) for c in entry.get("series", ())), rows=None if rows is None else (int(rows[0]), int(rows[1])),
        magnitudes=None if magnitudes is None else magnitudes.float(),
        convolutions_back=bool(entry.get("convolutions_back")),
    )  # fmt: skip


LAYOUT = Layout(name="native", claims=lambda key: key.endswith(TRIANGLE), read=read)
