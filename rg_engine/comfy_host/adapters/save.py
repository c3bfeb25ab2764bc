"""What the Save OFT node does: an adapter under the names and in the layout of another tool."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import folder_paths
import torch
from torch import Tensor

from ...adapters import Adapter
from ...adapters.adapter import Named
from ...adapters.saving import FORMATS, PEFT_FILES, Format, save_as, save_native, write_tensors
from ...errors import AdapterError
from ..folders import OFT_FOLDERS, plain_name
from .apply import Fit, fit
from .names import MODEL, diffusers_names, stored_weights

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16}


def save_oft(adapter: Adapter, name: str, form: Format, model: Any, precision: str = "fp32", overwrite: bool = False) -> str:
    """Into ``models/oft``; returns its name in the list, numbered if that one is taken. model: whose names and shapes a file
    that is not native needs. Raises AdapterError if the format can't hold the adapter exactly; nothing is written then."""
    if form not in FORMATS:
        raise AdapterError(f"format {form!r} is unknown: expected one of {', '.join(FORMATS)}")
    dtype, path = PRECISIONS[precision], _free_path(plain_name(name.removesuffix(".safetensors")), form, overwrite)
    if form == "native":
        save_native(adapter, path, dtype)
    else:
        if model is None:
            raise AdapterError(f"a file of the kind {form!r} has names and shapes of the model it is for: connect model")
        found = fit(adapter, model)
        lost = [what for what, there in (
            ("biases and norms that are added to", bool(adapter.added) and form != "difference"),
            ("a hint network", bool(adapter.hint)),
            (f"{len(found.unused)} layers that this model does not have", bool(found.unused)),
        ) if there]  # fmt: skip
        if lost:
            raise AdapterError(f"{form} can't hold all of it: it has {' and '.join(lost)}. Save it as native")
        if form == "difference":
            write_tensors(path, {key: value.to(dtype) for key, value in differences(found, model).items()}, {"format": "pt"})
        else:
            save_as(named(found, model), form, path, dtype)
    folder = folder_paths.get_folder_paths(OFT_FOLDERS[0])[0]
    return str((path / PEFT_FILES[0] if form == "PEFT" else path).relative_to(folder))


def named(found: Fit, model: Any) -> list[Named]:
    """Its layers by the names that tools have. Raises AdapterError for parts of fused weights."""
    theirs = {ours: name for name, ours in diffusers_names(model).items()}
    state = model.model.state_dict()
    layers = []
    for layer in found.layers:
        key, part = layer.place
        if part is not None:
            raise AdapterError(f"{key} is turned in part, which only native files and differences hold")
        layers.append(Named(key=key, shape=tuple(state[key].shape), diffusers=theirs.get(key), rotation=layer.rotation))
    return layers


def differences(found: Fit, model: Any) -> dict[str, Tensor]:
    """W' - W of every layer at strength 1, in fp32, by the names that ComfyUI's Load LoRA takes. Raises AdapterError for
    weights that can't be seen as they are."""
    state, made = stored_weights(model), dict[str, Tensor]()
    for layer in found.layers:
        key, part = layer.place
        weight = state[key]
        if not weight.is_floating_point() or weight.is_meta:
            raise AdapterError(f"{key} is quantised, so its difference is not known: load the model in fp16 or more")
        whole = made.setdefault(f"{key.removesuffix('.weight')}.diff", torch.zeros(weight.shape))
        window = whole if part is None else whole.narrow(*part)
        before = (weight if part is None else weight.narrow(*part)).float().cpu()
        window += layer.rotation.turn(before) - before
    for key, tensor in found.added.items():
        name = key.removesuffix(".weight").removesuffix(".bias")
        made[f"{name}.{'diff_b' if key.endswith('.bias') else 'diff'}"] = tensor.float()
    return {key if key.startswith(MODEL) else MODEL + key: value for key, value in made.items()}


def _free_path(stem: str, form: Format, overwrite: bool) -> Path:
    folder, ending = Path(folder_paths.get_folder_paths(OFT_FOLDERS[0])[0]), "" if form == "PEFT" else ".safetensors"
    path, number = folder / f"{stem}{ending}", 2
    while path.exists() and not overwrite:
        path, number = folder / f"{stem}_{number}{ending}", number + 1
    return path
