"""Small real models for tests, made as ComfyUI makes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from comfyui_host import engine

PARITY = Path(__file__).parent / "parity" / "data"


def parity_model(weights: torch.dtype = torch.float32, folder: Path = PARITY) -> Any:
    """The parity kit's UNet as a MODEL that computes in fp32; weights: what they are stored in; folder: another kit's."""
    import comfy.supported_models
    from safetensors.torch import load_file

    config = comfy.supported_models.SD15(json.loads((folder / "unet_config.json").read_text())["unet_config"])
    config.set_inference_dtype(weights, None if weights == torch.float32 else torch.float32)
    model = config.get_model({}, "")
    model.diffusion_model.load_state_dict(load_file(folder / "unet.safetensors"))
    return patcher(model)


def sdxl_model(seed: int = 0) -> Any:
    """A UNet of SDXL's shape (9 maps, a label embedding), small, with random weights."""
    import comfy.supported_models

    config = {
        "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [2, 2, 2],
        "channel_mult": [1, 2, 4], "transformer_depth": [0, 0, 2, 2, 3, 3],
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 3, 3, 3], "transformer_depth_middle": 3, "context_dim": 64,
        "use_spatial_transformer": True, "legacy": False, "use_checkpoint": False, "use_linear_in_transformer": True,
        "adm_in_channels": 2816, "num_classes": "sequential", "use_temporal_attention": False,
    }  # fmt: skip

    class SmallSDXL(comfy.supported_models.SDXL):
        unet_extra_config = {"num_heads": 4, "num_head_channels": -1}

    model = SmallSDXL(config).get_model({}, "")
    engine("lab.cost.models").randomise(model.diffusion_model, seed=seed, scale=1.2)
    return patcher(model)


def patcher(model: Any) -> Any:
    import comfy.model_management
    import comfy.model_patcher

    device = comfy.model_management.get_torch_device()
    return comfy.model_patcher.ModelPatcher(model.to(device), load_device=device, offload_device=device)
