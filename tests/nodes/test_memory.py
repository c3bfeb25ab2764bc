"""The memory that is asked for covers the graph, on the shapes that people run (counted without computing anything)."""

from __future__ import annotations

import pytest
import torch
from comfyui_host import engine
from torch._subclasses.fake_tensor import FakeTensorMode

pytestmark = pytest.mark.usefixtures("comfyui")

COMMON = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "use_spatial_transformer": True,
    "legacy": False, "use_checkpoint": False, "use_temporal_attention": False,
}  # fmt: skip
SD15 = {
    **COMMON, "num_res_blocks": [2, 2, 2, 2], "channel_mult": [1, 2, 4, 4], "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1] * 9 + [0] * 3, "transformer_depth_middle": 1, "context_dim": 768,
    "use_linear_in_transformer": False, "adm_in_channels": None,
}  # fmt: skip
SDXL = {
    **COMMON, "num_res_blocks": [2, 2, 2], "channel_mult": [1, 2, 4], "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "transformer_depth_middle": 10, "context_dim": 2048,
    "use_linear_in_transformer": True, "adm_in_channels": 2816, "num_classes": "sequential",
}  # fmt: skip


@pytest.mark.parametrize(("name", "config", "cells"), [("SD1.5", SD15, 64), ("SDXL", SDXL, 128)])
def test_the_estimate_is_near_what_autograd_keeps(name, config, cells):
    import comfy.supported_models
    from comfy.ldm.modules.attention import attention_pytorch

    class Patcher:
        def __init__(self, model):
            self.model = model

        def model_dtype(self):
            return torch.float16

    with FakeTensorMode(), torch.inference_mode(False), torch.enable_grad():
        kind = comfy.supported_models.SD15 if name == "SD1.5" else comfy.supported_models.SDXL
        described = kind(config)
        described.unet_config["dtype"] = torch.float16
        model = described.get_model({}, "")
        network = model.diffusion_model.requires_grad_(False)
        weights = {p.untyped_storage()._cdata for p in network.parameters()}
        kept = {}

        def count(tensor):
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                kept[storage._cdata] = (storage.nbytes(), tensor)  # the tensor is held, so that its address stays its own
            return tensor

        x = torch.randn(1, 4, cells, cells, dtype=torch.float16, requires_grad=True)
        context = torch.randn(1, 77, config["context_dim"], dtype=torch.float16)
        pooled = {"y": torch.randn(1, 2816, dtype=torch.float16)} if name == "SDXL" else {}
        options = {"optimized_attention_override": lambda _, *args, **kwargs: attention_pytorch(*args, **kwargs)}
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            network(x, torch.tensor([500.0]), context=context, transformer_options=options, **pooled)
    backbone = engine("features").detect_backbone(network)
    assert backbone.name == name
    memory = engine("comfy_host.memory")
    counted = sum(size for size, _ in kept.values())
    estimated = memory.graph_bytes(Patcher(model), backbone, (1, 4, cells, cells)) / (1 + memory.BACKWARD_SHARE)
    assert counted == pytest.approx(estimated, rel=0.05)
    roomy = memory.with_room_for_graph(Patcher(model), backbone, [1, 4, cells, cells])
    plain, asked = (model.memory_required([2 * b, 4, cells, cells]) for b in (1, roomy[0]))
    assert asked >= plain + counted
