"""What the Extract OFT node does: the rotations that best take one model to another."""

from __future__ import annotations

import logging
import re
from typing import Any

import comfy.lora
import comfy.model_management
import comfy.utils
import torch
from torch import Tensor

from ...adapters import Adapter, Layer
from ...adapters.extract import extract
from ...adapters.learning import LAYERS, OftSettings
from ...adapters.orthogonal import largest_angle
from ...errors import AdapterError
from .names import MODEL, stored_weights

log = logging.getLogger("readout_guidance")


def extract_oft(base: Any, changed: Any, layers: str, blocks: int, block_size: int) -> tuple[Adapter, str]:
    """The adapter, side in, and a report. Raises AdapterError if the models differ in kind, or not at all."""
    before, after = _weights(base, layers), _weights(changed, layers)
    other = sorted(set(before) ^ set(after)) or [k for k in before if before[k].shape != after[k].shape]
    if other or not before:
        what = f"{other[0]} is another one" if other else f"neither has layers of the kind {layers!r}"
        raise AdapterError(f"the models are not of one kind: {what}. Connect a model and one that was finetuned from it")
    settings = OftSettings(blocks=blocks, block_size=block_size)
    found, bar = [], comfy.utils.ProgressBar(len(before))
    for key, weight in before.items():
        comfy.model_management.throw_exception_if_processing_interrupted()
        if not torch.equal(weight, after[key]):
            found.append((key, extract(weight, after[key], *settings.divided(weight.flatten(1).shape[1]))))
        bar.update(1)
    if not found:
        raise AdapterError("the models have the same weights in these layers: there is nothing to extract")
    total, left = sum(each.changed for _, each in found), sum(each.left for _, each in found)
    turned = tuple(Layer(key=key, rotation=each.rotation) for key, each in found)
    share = (left / total) ** 0.5
    flipped, still = (sum(getattr(each, name) for _, each in found) for name in ("flipped", "still"))
    lines = [
        f"{len(turned)} of {len(before)} layers are turned, by up to "
        f"{max(largest_angle(each.rotation.q) for each in turned):.1f} degrees",
        f"{share:.1%} of the change is no rotation of these blocks"
        + (": an adapter of this kind holds little of it" if share > 0.7 else ""),
    ]
    lines += (
        [f"{flipped} blocks are nearest to a reflection: their weakest direction was turned the other way"]
        if flipped
        else []
    )
    lines += [f"{still} blocks turn by 180 degrees, which has no Cayley form: left as they are"] if still else []
    report = "\n".join(lines)
    log.info("Extract OFT: %s", report.replace("\n", "; "))
    return Adapter(layout="extracted", layers=turned, facts={"left_share": share}), report


def _weights(model: Any, layers: str) -> dict[str, Tensor]:
    """With the patches of the model (LoRAs, other adapters) in them. Raises AdapterError for quantised ones."""
    weights = {}
    for key, value in stored_weights(model).items():
        own = key.removeprefix(MODEL).removesuffix(".weight")
        if not (key.startswith(MODEL) and key.endswith(".weight") and value.ndim in (2, 4)) or not re.search(
            LAYERS[layers], f".{own}"
        ):
            continue
        if not value.is_floating_point() or value.is_meta:
            raise AdapterError(f"{key} is quantised: load both models in fp16 or more")
        weight = value.float().to("cpu", copy=True)
        patches = model.patches.get(key)
        weights[key.removesuffix(".weight")] = comfy.lora.calculate_weight(patches, weight, key) if patches else weight
    return weights
