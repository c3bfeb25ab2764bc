"""How much memory the gradient's graph takes: which graph there is room for, and room made before the model is loaded."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence
from typing import Any

import comfy.model_management

from ...features import Backbone
from ...heads import ReadoutHead
from .gradient_scope import Graph

log = logging.getLogger("readout_guidance")
#: Tensor elements that are kept for backward at a time, for each latent cell of one picture's branch (counted by
#: tests/nodes/test_memory.py on the real shapes); networks of other shapes are taken for SDXL's.
GRAPH_ELEMENTS_PER_CELL: dict[str, dict[Graph, int]] = {
    "SD1.5": {"full": 97_000, "light": 19_000},
    "SD2.x": {"full": 97_000, "light": 19_000},
    "SDXL": {"full": 163_000, "light": 16_000},
}
#: Tensor elements of the tapped maps of SD1.5 and SDXL for each latent cell, about.
FEATURE_ELEMENTS_PER_CELL = 1_700
#: What backward itself needs on top, as a part of the graph.
BACKWARD_SHARE = 0.15


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraphSize:
    """What sizes the graph of a guided pass: how many branches it guides at once, and the heads that read them."""

    backbone: Backbone
    heads: tuple[ReadoutHead, ...]
    branches: int = 1

    def bytes(self, model: Any, noise_shape: Sequence[int], graph: Graph) -> int:
        """For a ModelPatcher and noise_shape (B, C, H, W): the network's graph, and that of one head of one branch."""
        known = GRAPH_ELEMENTS_PER_CELL.get(self.backbone.name)
        wide = max(self.backbone.channels) / 1280
        elements = (known or GRAPH_ELEMENTS_PER_CELL["SDXL"])[graph] * (1 if known else wide)
        size = comfy.model_management.dtype_size(model.model.manual_cast_dtype or model.model_dtype())
        head = max((head.network.kept_channels(graph == "light") for head in self.heads), default=0)
        in_fp32 = head + 2 * FEATURE_ELEMENTS_PER_CELL * wide  # of the features, copies and gradients
        cells = noise_shape[0] * math.prod(noise_shape[2:])
        return round(cells * (self.branches * elements * size + 4 * in_fp32) * (1 + BACKWARD_SHARE))


def choose_graph(model: Any, size: GraphSize, noise_shape: Sequence[int]) -> Graph:
    """full where there is room for it beside the model and what sampling needs, else light, with a line in the log.

    Room is what is free and what ComfyUI can free by unloading other models.
    """
    management, device = comfy.model_management, model.load_device
    others = sum(
        loaded.model_loaded_memory()
        for loaded in management.current_loaded_models
        if loaded.device == device and loaded.model is not None and loaded.model.model is not model.model
    )
    room = management.get_free_memory(device) + others - management.extra_reserved_memory()
    weights = max(model.model_size() - model.loaded_size(), 0)
    sampling = model.model.memory_required([2 * noise_shape[0], *noise_shape[1:]])
    full, light = (size.bytes(model, noise_shape, graph) for graph in ("full", "light"))
    if weights + sampling + full <= room:
        return "full"
    log.info(
        "Readout guidance: the gradient needs %.1f GB and %.1f GB are free beside the model, so the light graph is used: "
        "%.1f GB, guided steps take about a quarter longer.",
        full / 1e9,
        max(room - weights - sampling, 0) / 1e9,
        light / 1e9,
    )
    return "light"


def with_room_for_graph(model: Any, size: GraphSize, noise_shape: Sequence[int], graph: Graph) -> list[int]:
    """A noise shape of so many more pictures that ComfyUI's own estimate covers the graph as well."""
    own = model.model.memory_required([2 * noise_shape[0], *noise_shape[1:]])
    share = size.bytes(model, noise_shape, graph) / max(own, 1)
    return [math.ceil(noise_shape[0] * (1 + share)), *noise_shape[1:]]


def is_out_of_memory(error: BaseException) -> bool:
    newer = getattr(comfy.model_management, "is_oom", None)
    return newer(error) if newer is not None else isinstance(error, comfy.model_management.OOM_EXCEPTION)
