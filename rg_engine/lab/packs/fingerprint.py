"""What has to be as before once a guided run is over: the network, the patcher that was given, ComfyUI's own functions."""

from __future__ import annotations

import hashlib
import sys
from typing import Any

import torch

#: Modules of ComfyUI whose functions packs and wrappers may replace for the time of a run.
WATCHED = ("comfy.samplers", "comfy.sample", "comfy.model_base", "comfy.model_patcher", "comfy.ldm.modules.attention",
           "comfy.ldm.modules.diffusionmodules.openaimodel", "comfy.k_diffusion.sampling", "comfy.model_management",
           "comfy.ops", "latent_preview", "nodes")  # fmt: skip

Fingerprint = dict[str, Any]


def fingerprint(model: Any) -> Fingerprint:
    """Of a ModelPatcher whose weights are unpatched: each part by name."""
    found: Fingerprint = {**network_state(model), **{f"patcher {key}": value for key, value in patcher_state(model).items()}}
    for name in WATCHED:
        for key, value in vars(sys.modules[name]).items() if name in sys.modules else ():
            if callable(value) and not key.startswith("__"):  # torch.compile adds such
                found[f"{name}.{key}"] = value
    found["modes"] = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    found["in_training"] = getattr(sys.modules.get("comfy.model_management"), "in_training", None)
    return found


def network_state(model: Any) -> Fingerprint:
    """A patcher's network: the bytes of its weights, its layers with their hooks and replaced forwards."""
    network = model.model.diffusion_model
    found: Fingerprint = {}
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        raw = tensor.detach().as_subclass(torch.Tensor).clone().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        digest = hashlib.sha256(raw).hexdigest()
        found[f"weight {name}"] = (tensor.requires_grad, tensor.is_inference(), tuple(tensor.shape), digest)
    for name, module in network.named_modules():
        hooks = (len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks))
        found[f"layer {name}"] = (type(module), hooks, module.__dict__.get("forward"), module.training)
    return found


def patcher_state(model: Any) -> Fingerprint:
    """What a patcher carries beside its network."""
    names = ("model_options", "wrappers", "callbacks", "patches", "object_patches", "attachments", "additional_models",
             "injections", "hook_patches", "weight_wrapper_patches")  # fmt: skip
    return {name: _structure(getattr(model, name, None)) for name in names}


def changed(before: Fingerprint, after: Fingerprint) -> list[str]:
    """The names of what differs."""
    return [name for name in {**before, **after} if name not in before or name not in after or before[name] != after[name]]


def _structure(value: Any) -> Any:
    """A copy of nested containers that holds what is in them by identity."""
    if isinstance(value, dict):
        return {key: _structure(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_structure(each) for each in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return (type(value).__name__, id(value))
