"""Which of the model's weights a layer of an adapter file is, whoever named it."""

from __future__ import annotations

from typing import Any

import comfy.lora
import comfy.utils

from ...adapters import Layer

MODEL = "diffusion_model."
#: A weight's key, and (dimension, first, count) of it where it is a part of a fused one.
Place = tuple[str, tuple[int, int, int] | None]


class WeightNames:
    """The weights of a ModelPatcher and of a CLIP by every name that they go by."""

    def __init__(self, model: Any, clip: Any = None) -> None:
        inner = model.model
        self._known: dict[str, Any] = {}
        for key in inner.state_dict():
            if key.startswith(MODEL) and key.endswith(".weight"):
                own = key.removeprefix(MODEL).removesuffix(".weight")
                self._known[own] = self._known[own.replace(".", "_")] = key
        for theirs, ours in diffusers_names(model).items():
            self._known[theirs] = self._known[theirs.replace(".", "_")] = ours
        self._comfy = comfy.lora.model_lora_keys_unet(inner, {})
        self._clip = {} if clip is None else comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {})

    def model_place(self, layer: Layer) -> Place | None:
        """None too where ComfyUI rearranges the weight for the name, which a turn does not survive."""
        return _place(self._known.get(layer.name) or self._comfy.get(layer.key) or self._comfy.get(layer.name))

    def clip_place(self, layer: Layer) -> Place | None:
        return _place(self._clip.get(layer.key) or self._clip.get(layer.name))


def diffusers_names(model: Any) -> dict[str, str]:
    """diffusers' names of a UNet's layers to the model's weights; empty for other networks."""
    config = model.model.model_config.unet_config
    if "num_res_blocks" not in config:
        return {}
    names = comfy.utils.unet_to_diffusers(config)
    return {
        theirs.removesuffix(".weight"): MODEL + ours
        for theirs, ours in names.items()
        if theirs.endswith(".weight") and isinstance(ours, str)
    }


def stored_weights(model: Any) -> dict[str, Any]:
    """A ModelPatcher's weights by key, without patches: where ComfyUI has left patched ones in the model, its backups."""
    weights = dict(model.model.state_dict())
    weights.update({key: kept.weight for key, kept in model.backup.items()})
    weights.update({key: kept[0] for key, kept in model.hook_backup.items()})
    return weights


def _place(found: Any) -> Place | None:
    if found is None or isinstance(found, str):
        return None if found is None else (found, None)
    return (found[0], tuple(found[1])) if len(found) == 2 else None
