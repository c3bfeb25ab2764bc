"""The authors' ``.pt`` files: a dictionary with ``config`` and ``aggregation_network``, as their training code saves it."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import HeadFileError
from .head import ReadoutHead
from .pixel import PixelNetwork


def to_authors_layout(head: ReadoutHead) -> dict[str, Any]:
    """The dictionary that the authors' code saves with ``torch.save`` (keys ``bottleneck_layers.i.``)."""
    spec = head.spec
    network = head.network
    if isinstance(network, PixelNetwork) or any(patch > 1 for patch in network.patches):
        what = "a per-pixel head" if isinstance(network, PixelNetwork) else "the head of a transformer"
        raise HeadFileError(f"head {head.name!r} is {what}, which the authors' layout has no place for: save .safetensors")
    sequential = not spec.use_emb and spec.kind != "correspondence"  # how the authors' files say: run without emb
    state = head.network.state_dict()
    if sequential:
        state = {re.sub(r"^(bottleneck_layers\.\d+)\.", r"\1.0.", key): value for key, value in state.items()}
    return {
        "step": int(spec.training.get("steps", 0)),
        "config": {
            "projection_dim": head.network.projection_channels,
            "dims": list(spec.feature_channels),
            "save_timestep": [0],
            "num_timesteps": 1000,
            "aggregation_kwargs": {
                "use_output_head": head.output_channels > 0,
                "output_head_channels": head.output_channels or 3,
                "output_head_act": spec.activation == "tanh",
                "bottleneck_sequential": sequential,
            },
            "dataset_args": {"control_range": list(spec.control_range), "kind": spec.kind},
        },
        "aggregation_network": dict(state),
    }


def tagged(value: Any, what: str) -> Any:
    """A config (or ``what``) as JSON can hold it, tuples told from lists. Raises HeadFileError for anything that it
    can't."""
    if isinstance(value, dict) and all(isinstance(key, str) and key != "tuple" for key in value):
        return {key: tagged(item, what) for key, item in value.items()}
    if isinstance(value, tuple):
        return {"tuple": [tagged(item, what) for item in value]}
    if isinstance(value, list):
        return [tagged(item, what) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise HeadFileError(f"the {what} holds {value!r:.60}, which can't be kept in a .safetensors file")


def untagged(value: Any) -> Any:
    if isinstance(value, dict):
        return (
            tuple(map(untagged, value["tuple"])) if list(value) == ["tuple"] else {k: untagged(v) for k, v in value.items()}
        )
    return [untagged(item) for item in value] if isinstance(value, list) else value


def read_authors(path: Path, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise HeadFileError(
            f"{name!r} holds something other than tensors and plain values and was not opened: it may run code, or be "
            "no head at all"
        ) from error
    except Exception as error:  # torch's unpickler raises whatever a damaged file leads it to
        raise HeadFileError(f"{name!r} can't be read: it is truncated or no PyTorch file") from error
    tensors = loaded.get("aggregation_network") if isinstance(loaded, dict) else None
    config = loaded.get("config") if isinstance(loaded, dict) else None
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise HeadFileError(f"{name!r} is not a readout head: it has no 'aggregation_network' of tensors")
    config = config if isinstance(config, dict) else {}
    aggregation = config.get("aggregation_kwargs") or {}
    dataset = config.get("dataset_args") or {}
    if not isinstance(aggregation, dict) or not isinstance(dataset, dict):
        raise HeadFileError(f"{name!r} has a damaged config: aggregation_kwargs and dataset_args must be dictionaries")
    sequential = any(re.match(r"bottleneck_layers\.\d+\.0\.", key) for key in tensors)
    fields: dict[str, Any] = {
        "backbone": str(config.get("model_id", "unknown")),
        "use_emb": not sequential,  # the authors' sequential layout never passes the embedding on
        "timestep_convention": "reversed",
        "activation": "tanh" if aggregation.get("output_head_act", True) else "none",
    }
    try:
        if "control_range" in dataset:
            low, high = dataset["control_range"]
            fields["control_range"] = (float(low), float(high))
        if loaded.get("step") is not None:
            fields["training"] = {"steps": int(loaded["step"])}
    except (TypeError, ValueError) as error:
        raise HeadFileError(f"{name!r} has a damaged config: its control_range or step is no number ({error})") from error
    if not any(key.startswith("output_head.") for key in tensors):  # one with an output head tells by its channels
        words = f"{dataset} {config.get('train_file', '')} {name}".lower()
        found = {
            kind
            for kind, signs in (("appearance", ("appearance", "triplet")), ("correspondence", ("correspondence", "tracks")))
            if any(sign in words for sign in signs)
        }
        if len(found) == 1:
            fields["kind"] = found.pop()
    return tensors, fields
