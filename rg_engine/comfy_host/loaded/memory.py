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
    "SD1.5": {"full": 86_000, "light": 19_000},
    "SD2.x": {"full": 86_000, "light": 19_000},
    "SDXL": {"full": 163_000, "light": 16_000},
}
#: Tensor elements of the tapped maps of SD1.5 and SDXL for each latent cell, about.
FEATURE_ELEMENTS_PER_CELL = 1_700
#: Of a transformer, see :func:`graph_elements`: text tokens where no prompt tells, and the streams of each block that the
#: light graph keeps.
TEXT_TOKENS = 256
LIGHT_STREAMS = 1
#: What backward itself needs on top, as a part of the graph.
BACKWARD_SHARE = 0.15


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraphSize:
    """What sizes the graph of a guided pass: how many branches it guides at once, the heads that read them, and, of a
    transformer, how many tokens of text and of reference pictures are beside the picture's."""

    backbone: Backbone
    heads: tuple[ReadoutHead, ...]
    branches: int = 1
    text: int = TEXT_TOKENS
    feature_maps: int = 2

    def bytes(self, model: Any, noise_shape: Sequence[int], graph: Graph) -> int:
        """For a ModelPatcher and noise_shape (B, C, H, W): the network's graph, and that of one head of one branch."""
        size = comfy.model_management.dtype_size(model.model.manual_cast_dtype or model.model_dtype())
        head = max((head.network.kept_channels(graph == "light") for head in self.heads), default=0)
        cells = noise_shape[0] * math.prod(noise_shape[2:])
        elements = graph_elements(self.backbone, noise_shape, graph, self.text)
        in_fp32 = cells * head + self.feature_maps * _feature_elements(self.backbone, noise_shape)
        return round((self.branches * elements * size + 4 * in_fp32) * (1 + BACKWARD_SHARE))


def graph_elements(backbone: Backbone, noise_shape: Sequence[int], graph: Graph, text: int = TEXT_TOKENS) -> float:
    """Tensor elements that one branch keeps for backward, for noise_shape (B, C, [1,] H, W).

    A transformer keeps, of each block up to the last tap and each token of picture and text, so many tensors of the block's
    width; with the light graph one stream of each, and one block's at a time.
    """
    cells = noise_shape[0] * math.prod(noise_shape[2:])
    if backbone.is_transformer:
        width = max(backbone.channels)
        tokens = cells / _patch(backbone) ** 2 + noise_shape[0] * text
        kept = backbone.depth * backbone.streams if graph == "full" else backbone.depth * LIGHT_STREAMS + backbone.streams
        return kept * tokens * width
    known = GRAPH_ELEMENTS_PER_CELL.get(backbone.name)
    return cells * (known or GRAPH_ELEMENTS_PER_CELL["SDXL"])[graph] * (1 if known else max(backbone.channels) / 1280)


def _feature_elements(backbone: Backbone, noise_shape: Sequence[int]) -> float:
    """Of the tapped maps."""
    cells = noise_shape[0] * math.prod(noise_shape[2:])
    if backbone.is_transformer:
        return sum(backbone.channels) * cells / _patch(backbone) ** 2
    return cells * FEATURE_ELEMENTS_PER_CELL * max(backbone.channels) / 1280


def _patch(backbone: Backbone) -> int:
    return next((layout.patch for layout in backbone.layouts if layout is not None), 1)


def tokens_beside(conds: dict[str, Any], backbone: Backbone) -> int:
    """The most tokens of text and of reference pictures that a prompt of a guider brings."""
    found = [0]
    for prompt in conds.values():
        for cond in prompt or ():
            words = cond.get("cross_attn")
            text = 0 if words is None else words.shape[1]
            pictures = sum(math.prod(latent.shape[2:]) for latent in cond.get("reference_latents") or ())
            found.append(text + pictures // _patch(backbone) ** 2)
    return max(found)


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
