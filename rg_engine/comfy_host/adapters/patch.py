"""A rotation as ComfyUI's weight adapter, which its ModelPatcher applies as it applies LoRAs: in memory that is short, in
fp8, in hooks, and when a checkpoint is saved."""

from __future__ import annotations

from typing import Any

import torch
from comfy.weight_adapter.base import WeightAdapterBase
from torch import Tensor

from ...adapters import Rotation, turn


class RotationPatch(WeightAdapterBase):
    """weights: Q, R at the strength that it was made for, magnitudes, and (that strength, side).

    All that it knows is in ``weights``: ComfyUI makes it anew from copies of them (``type(v)(v.loaded_keys, weights)``).
    """

    name = "readout_guidance_oft"

    def __init__(self, loaded_keys: set[str], weights: tuple[Tensor, Tensor, Tensor | None, tuple[float, str]]) -> None:
        self.loaded_keys = loaded_keys
        self.weights = weights

    @classmethod
    def of(cls, rotation: Rotation, strength: float, key: str) -> RotationPatch:
        """For a rotation that was :meth:`Rotation.fitted`."""
        return cls({key}, (rotation.q, rotation.blocks(strength), rotation.magnitudes, (strength, rotation.side)))

    def calculate_weight(self, weight: Tensor, key: str, strength: float, *_: Any, **__: Any) -> Tensor:
        """Turns ``weight`` in place, since it may be a part of a fused one, and returns it. Computed in fp32."""
        if strength == 0.0:
            return weight
        q, blocks, magnitudes, (made_for, side) = self.weights
        rotation = Rotation(q=q, side=side, magnitudes=magnitudes)  # type: ignore[arg-type]
        if strength != made_for:  # a hook's keyframe
            blocks = rotation.blocks(strength)
        weight.copy_(turn(weight, blocks.to(weight.device, torch.float32), rotation.side, rotation.scales(strength)))
        return weight
