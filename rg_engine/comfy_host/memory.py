"""How much memory the gradient's graph takes, so that ComfyUI makes room before it loads the model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import comfy.model_management

from ..features import Backbone

#: Tensor elements that autograd keeps for each latent cell of one picture's conditional branch (counted by
#: tests/nodes/test_memory.py on the real shapes); networks of other shapes are taken for SDXL's.
GRAPH_ELEMENTS_PER_CELL = {"SD1.5": 97_000, "SD2.x": 97_000, "SDXL": 163_000}
#: What backward itself needs on top, as a part of the graph.
BACKWARD_SHARE = 0.15


def graph_bytes(model: Any, backbone: Backbone, noise_shape: Sequence[int]) -> int:
    """Bytes of the graph of one guided branch; ``model`` is a ModelPatcher, noise_shape (B, C, H, W)."""
    elements = GRAPH_ELEMENTS_PER_CELL.get(backbone.name, GRAPH_ELEMENTS_PER_CELL["SDXL"])
    if backbone.name not in GRAPH_ELEMENTS_PER_CELL:
        elements = round(elements * max(backbone.channels) / 1280)
    size = comfy.model_management.dtype_size(model.model.manual_cast_dtype or model.model_dtype())
    return round(noise_shape[0] * math.prod(noise_shape[2:]) * elements * size * (1 + BACKWARD_SHARE))


def with_room_for_graph(model: Any, backbone: Backbone, noise_shape: Sequence[int]) -> list[int]:
    """A noise shape of so many more pictures that ComfyUI's own estimate covers the graph as well."""
    own = model.model.memory_required([2 * noise_shape[0], *noise_shape[1:]])
    share = graph_bytes(model, backbone, noise_shape) / max(own, 1)
    return [math.ceil(noise_shape[0] * (1 + share)), *noise_shape[1:]]
