"""Head files: our ``.safetensors`` and the authors' ``.pt``.

What a head is, is read from its tensors: layers, widths and the output head follow from keys and shapes. Metadata adds
what tensors can't tell (kind, range of the control, how the timestep was embedded in training).
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import HeadFileError
from ..types import HeadKind
from .aggregation import NORM_GROUPS, Activation, AggregationNetwork
from .authors import read_authors, tagged, to_authors_layout, untagged
from .head import HeadSpec, Network, ReadoutHead
from .pixel import PixelNetwork

FORMAT_VERSION = "1"
METADATA_KEY = "readout_head"
AUTHORS_KEY = "authors"


@torch.inference_mode(False)  # ComfyUI runs nodes in inference mode; these weights are differentiated through
def load_head(path: str | Path, kind: HeadKind | None = None, name: str | None = None) -> ReadoutHead:
    """Load a head file.

    Args: path to a ``.safetensors`` or an authors' ``.pt``; kind overrides what the file says or implies.
    Raises: HeadFileError if it is missing, truncated, holds code, or is not a readout head.
    """
    path = Path(path)
    name = name or path.name
    if not path.is_file():
        raise HeadFileError(f"there is no head file {name!r}: put it into models/readout_heads and refresh the list")
    tensors, spec_fields = _read_safetensors(path, name) if path.suffix == ".safetensors" else read_authors(path, name)
    if kind is not None:
        spec_fields["kind"] = kind
        spec_fields.setdefault("use_emb", kind != "correspondence")
    network, feature_channels = build_network(tensors, spec_fields.get("activation", "tanh"), name)
    spec_fields["kind"] = spec_fields.get("kind") or _guess_kind(network, name)
    if path.suffix != ".safetensors" and spec_fields["kind"] == "correspondence":
        spec_fields["use_emb"] = False
    _check_kind(network, spec_fields["kind"], name)
    spec = HeadSpec(feature_channels=feature_channels, **spec_fields)
    return ReadoutHead(network=network, spec=spec, name=name)


def save_head(head: ReadoutHead, path: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write a head as ``.safetensors`` with its spec as metadata; ``dtype`` stores it smaller."""
    _save(head.network.state_dict(), head.spec, path, dtype)


def convert_authors(source: str | Path, target: str | Path, kind: HeadKind | None = None) -> None:
    """An authors' ``.pt`` as ``.safetensors``: the same tensors, its config and step as metadata (their optimiser is left
    out)."""
    head = load_head(source, kind)
    raw = torch.load(source, map_location="cpu", weights_only=True)
    authors = json.dumps({"config": tagged(raw.get("config"), "config"), "step": tagged(raw.get("step"), "step")})
    _save(raw["aggregation_network"], head.spec, target, None, {AUTHORS_KEY: authors})


def convert_to_authors(source: str | Path, target: str | Path, kind: HeadKind | None = None) -> None:
    """A ``.safetensors`` head as an authors' ``.pt``: the very one that it came from, or a description of ours."""
    head = load_head(source, kind)
    layout = to_authors_layout(head)
    with safe_open(source, framework="pt") as file:
        authors = (file.metadata() or {}).get(AUTHORS_KEY)
        if authors is not None:
            kept = json.loads(authors)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            layout = {"step": kept["step"], "config": untagged(kept["config"]), "aggregation_network": tensors}
    torch.save(layout, target)


def _save(
    tensors: Mapping[str, Tensor],
    spec: HeadSpec,
    path: str | Path,
    dtype: torch.dtype | None,
    more: dict[str, str] | None = None,
) -> None:
    described = {"format_version": FORMAT_VERSION, **dataclasses.asdict(spec)}
    state = {key: value.detach().to("cpu", dtype or value.dtype, copy=True).contiguous() for key, value in tensors.items()}
    save_file(state, str(path), metadata={METADATA_KEY: json.dumps(described, sort_keys=True), **(more or {})})


def build_network(tensors: Mapping[str, Tensor], activation: Activation, name: str) -> tuple[Network, tuple[int, ...]]:
    """A network of the sizes that the tensors have, holding them; strict about every key.

    Both key layouts are taken: ``bottleneck_layers.i.conv1.weight`` and ``bottleneck_layers.i.0.conv1.weight``.
    """
    state = {re.sub(r"^(bottleneck_layers\.\d+)\.0\.", r"\1.", key): value.float() for key, value in tensors.items()}
    state.pop("logit_scale", None)  # a training constant in some files
    network = _pixel(state, name) if "noise_layer.weight" in state else _aggregation(state, activation, name)
    expected = network.state_dict()
    missing = sorted(set(expected) - set(state))
    unexpected = sorted(set(state) - set(expected))
    wrong = sorted(k for k in set(state) & set(expected) if state[k].shape != expected[k].shape)
    if missing or unexpected or wrong:
        listed = [
            f"{what} {', '.join(keys[:3])}{' ...' if len(keys) > 3 else ''}"
            for what, keys in (("missing", missing), ("unexpected", unexpected), ("misshapen", wrong))
            if keys
        ]
        raise HeadFileError(f"{name!r} is not a complete readout head: {'; '.join(listed)}")
    network.load_state_dict(state)
    return network, network.feature_channels


def _aggregation(state: Mapping[str, Tensor], activation: Activation, name: str) -> AggregationNetwork:
    count = len({key.split(".")[1] for key in state if key.startswith("bottleneck_layers.")})
    if not count or "mixing_weights" not in state:
        some = ", ".join(sorted(state)[:4]) or "nothing"
        raise HeadFileError(
            f"{name!r} is not a readout head: it holds {some}, ... but no bottleneck_layers and mixing_weights"
        )
    if state["mixing_weights"].numel() != count:
        raise HeadFileError(
            f"{name!r} mixes {state['mixing_weights'].numel()} maps but has {count} layers: heads over several timesteps "
            "can't steer one step"
        )
    layers = [f"bottleneck_layers.{i}" for i in range(count)]
    hidden = _shape(state, f"{layers[0]}.conv2.weight", 4, name, NORM_GROUPS)[0]
    has_emb, has_output = (any(part in key for key in state) for part in (".emb_layers.", "output_head."))
    return AggregationNetwork(
        tuple(_shape(state, f"{layer}.conv1.weight", 4, name)[1] for layer in layers),
        projection_channels=_shape(state, f"{layers[0]}.conv3.weight", 4, name, NORM_GROUPS)[0],
        hidden=hidden,
        emb_width=_shape(state, f"{layers[0]}.emb_layers.weight", 2, name)[1] if has_emb else 0,
        output_channels=_shape(state, "output_head.4.weight", 4, name)[0] if has_output else 0,
        activation=activation,
        patches=[math.isqrt(_shape(state, f"{layer}.conv1.weight", 4, name, hidden)[0] // hidden) for layer in layers],
    )


def _pixel(state: Mapping[str, Tensor], name: str) -> PixelNetwork:
    maps, layers = (
        sum(key.startswith(f"{part}.") and key.endswith("weight") for key in state) for part in ("map_layers", "layers")
    )
    if not maps or not layers:
        raise HeadFileError(f"{name!r} is not a complete readout head: missing map_layers or layers")
    shapes = [_shape(state, f"layers.{i}.weight", 2, name) for i in range(layers)]
    return PixelNetwork(
        tuple(_shape(state, f"map_layers.{i}.weight", 4, name)[1] for i in range(maps)),
        output_channels=shapes[-1][0],
        widths=tuple(shape[1] for shape in shapes),
    )


def _shape(state: Mapping[str, Tensor], key: str, dims: int, name: str, groups: int = 1) -> torch.Size:
    shape = state[key].shape if key in state else None
    if shape is None or len(shape) != dims or 0 in shape or shape[0] % groups:
        found = "missing" if shape is None else f"misshapen {tuple(shape)}"
        raise HeadFileError(f"{name!r} is not a complete readout head: {key} is {found}")
    return shape


def _read_safetensors(path: Path, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise HeadFileError(f"{name!r} can't be read: it is truncated or no safetensors file ({error})") from error
    if METADATA_KEY not in metadata:
        return tensors, {}
    try:
        described = json.loads(metadata[METADATA_KEY])
        version = described.pop("format_version")
        if version != FORMAT_VERSION:
            raise HeadFileError(f"{name!r} has head format {version}; this version reads {FORMAT_VERSION}: update it")
        described.pop("feature_channels")
        described["control_range"] = tuple(float(v) for v in described["control_range"])
        described["taps"] = tuple(str(tap) for tap in described.get("taps", ()))
        unknown = set(described) - {field.name for field in dataclasses.fields(HeadSpec)}
        if unknown or len(described["control_range"]) != 2:
            raise HeadFileError(f"{name!r} has metadata that isn't understood: {', '.join(sorted(unknown)) or 'range'}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, HeadFileError):
            raise
        raise HeadFileError(f"{name!r} has damaged metadata: {error}") from error
    return tensors, described


def _guess_kind(network: Network, name: str) -> HeadKind:
    if isinstance(network, PixelNetwork):
        return "lgp"
    if network.output_channels:
        return "keypoint" if network.output_channels == 18 else "spatial"
    lowered = name.lower()
    for kind in ("appearance", "correspondence"):
        if kind in lowered:
            return kind
    raise HeadFileError(
        f"{name!r} does not say what kind of head it is: choose appearance or correspondence as kind in Load Readout Head"
    )


def _check_kind(network: Network, kind: HeadKind, name: str) -> None:
    if isinstance(network, PixelNetwork):
        if kind != "lgp":
            raise HeadFileError(f"{name!r} can't be read as {kind}: it is a per-pixel network. Choose lgp or auto as kind")
        return
    has_output = network.output_channels > 0
    if kind in ("spatial", "keypoint") and not has_output:
        raise HeadFileError(
            f"{name!r} can't be read as {kind}: it has no output head. Choose appearance, correspondence or auto as kind"
        )
    if kind in ("appearance", "correspondence") and has_output:
        raise HeadFileError(
            f"{name!r} can't be read as {kind}: it has an output head of {network.output_channels} channels. "
            "Choose spatial, keypoint or auto as kind"
        )
    if kind == "lgp":
        raise HeadFileError(f"{name!r} can't be read as lgp: it is an aggregation network. Choose auto as kind")
