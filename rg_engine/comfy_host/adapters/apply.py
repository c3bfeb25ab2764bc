"""Puts an adapter on a model, as patches beside LoRAs, and says what became of it."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from ...adapters import Adapter, Rotation
from ...errors import AdapterError
from .names import Place, WeightNames
from .patch import RotationPatch


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Fitted:
    """A layer's rotation and the weight that it turns."""

    place: Place
    rotation: Rotation
    of_clip: bool


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Fit:
    """What of an adapter goes where, and the keys of what has no place."""

    layers: tuple[Fitted, ...]
    added: dict[str, Tensor]
    unused: tuple[str, ...]


def fit(adapter: Adapter, model: Any, clip: Any = None) -> Fit:
    """Find each layer's weight. Raises AdapterError if none is found, or one does not fit its weight; nothing is changed."""
    names, shapes, packed = WeightNames(model, clip), {}, set()
    for owner in (model.model, None if clip is None else clip.cond_stage_model):
        weights = {} if owner is None else {**owner.state_dict(), **dict(owner.named_parameters())}
        shapes[owner is not model.model] = {key: tuple(_shape(weight)) for key, weight in weights.items()}
        packed |= {key for key, weight in weights.items() if _is_packed(weight)}
    layers, unused = [], []
    for layer in adapter.layers:
        place, of_clip = names.model_place(layer), False
        if place is None:
            place, of_clip = names.clip_place(layer), True
        if place is None or place[0] not in shapes[of_clip]:
            unused.append(layer.key)
            continue
        if place[0] in packed:
            raise AdapterError(
                f"{place[0]} is quantised in a way that is not known here, so it can't be turned: load the model in fp8, "
                "fp16 or GGUF"
            )
        shape, rows = shapes[of_clip][place[0]], layer.rotation.rows
        if rows is not None:
            place = (place[0], (0, rows[0] + (place[1][1] if place[1] is not None else 0), rows[1]))
            if sum(rows) > shape[0]:
                raise AdapterError(
                    f"{layer.key}: for rows up to {sum(rows)}, and {place[0]} has {shape[0]}: another kind of model"
                )
        if place[1] is not None:
            dimension, _, count = place[1]
            shape = (*shape[:dimension], count, *shape[dimension + 1 :])
        layers.append(Fitted(place=place, rotation=layer.rotation.fitted(shape, layer.key), of_clip=of_clip))
    places = [(layer.place, layer.of_clip) for layer in layers]
    twice = next((place for place, of_clip in places if places.count((place, of_clip)) > 1), None)
    if twice is not None:
        raise AdapterError(f"two layers of the file turn {twice[0]}: it was put together wrongly")
    added = {}
    for key, tensor in adapter.added.items():
        base, _, ending = key.rpartition(".")
        target = f"{base}.{'bias' if ending == 'diff_b' else 'weight'}"
        if shapes[False].get(target) == tuple(tensor.shape):
            added[target] = tensor
        else:
            unused.append(key)
    if not layers:
        flux = any("double_blocks" in key or "single_blocks" in key or "single_transformer_blocks" in key for key in unused)
        raise AdapterError(
            f"none of its {len(adapter.layers)} layers is in this model (the first: {', '.join(unused[:3])}): it was "
            f"trained on {'Flux, and this is none' if flux else 'another kind of model'}"
        )
    return Fit(layers=tuple(layers), added=added, unused=tuple(unused))


def apply(found: Fit, model: Any, clip: Any, strength: float, clip_strength: float) -> tuple[Any, Any]:
    """Clones of model and clip with the adapter on them; at strength 0 without a patch."""
    model, clip = model.clone(), None if clip is None else clip.clone()
    for owner, at, of_clip in ((model, strength, False), (None if clip is None else clip.patcher, clip_strength, True)):
        if owner is None or at == 0.0:
            continue
        patches: dict[Any, Any] = {}
        for layer in found.layers:
            if layer.of_clip == of_clip:
                key, part = layer.place
                patches[key if part is None else (key, part)] = RotationPatch.of(layer.rotation, at, key)
        owner.add_patches(patches, at)
        if not of_clip and found.added:
            owner.add_patches({key: ("diff", (tensor,)) for key, tensor in found.added.items()}, at)
    return model, clip


def _shape(weight: Any) -> Any:
    return getattr(weight, "tensor_shape", weight.shape)  # a packed weight's (GGUF)


def _is_packed(weight: Any) -> bool:
    """Whether its numbers are no weights until its layer unpacks them, and neither ComfyUI nor GGUF does so for patches."""
    return not weight.dtype.is_floating_point and not hasattr(weight, "tensor_shape")
