"""What must be as before after a run: the loaded model, and torch's modes."""

from __future__ import annotations

import hashlib

import torch


def fingerprint(model) -> list:
    """Each parameter as an object, its bytes, and every hook and replaced forward of the network."""
    network = model.model.diffusion_model
    found = []
    for name, parameter in network.named_parameters():
        digest = hashlib.sha256(parameter.detach().clone().numpy().tobytes()).hexdigest()
        found.append((name, id(parameter), parameter.is_inference(), digest))
    for name, module in network.named_modules():
        found.append((name, len(module._forward_hooks), len(module._forward_pre_hooks), "forward" in module.__dict__))
    return found


def modes() -> tuple[bool, bool]:
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled()
