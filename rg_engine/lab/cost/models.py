"""Networks of known shapes with random weights, as ComfyUI loads them, with heads and a ControlNet that fit them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import comfy.cldm.cldm
import comfy.controlnet
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.supported_models
import torch
from torch import Tensor, nn

from ...comfy_host.demo_model.unet import UNET_CONFIG, DemoModelConfig
from ...comfy_host.loaded.model import backbone_of
from ...guidance import Target
from ...heads import ReadoutHead
from ...training import new_head

_COMMON = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "use_spatial_transformer": True,
    "legacy": False, "use_checkpoint": False, "use_temporal_attention": False, "adm_in_channels": None,
}  # fmt: skip
SD15: dict[str, Any] = {
    **_COMMON, "num_res_blocks": [2, 2, 2, 2], "channel_mult": [1, 2, 4, 4], "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1] * 9 + [0] * 3, "transformer_depth_middle": 1, "context_dim": 768,
    "use_linear_in_transformer": False,
}  # fmt: skip
SDXL: dict[str, Any] = {
    **_COMMON, "num_res_blocks": [2, 2, 2], "channel_mult": [1, 2, 4], "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "transformer_depth_middle": 10, "context_dim": 2048,
    "use_linear_in_transformer": True, "adm_in_channels": 2816, "num_classes": "sequential",
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """A network's shape: config, of its UNet; cells, the latent's side; projection, the width of its heads (the authors' 384
    for a UNet of 320 channels, in proportion for narrower ones)."""

    config: dict[str, Any]
    cells: int
    projection: int = 384


SHAPES = {
    "demo": Shape(config=UNET_CONFIG, cells=16, projection=64),
    "small": Shape(
        config={**SD15, "model_channels": 96, "channel_mult": [1, 2, 3, 3], "context_dim": 256}, cells=32, projection=128
    ),
    "sd15": Shape(config=SD15, cells=64),
    "sdxl": Shape(config=SDXL, cells=128),
}
TOKENS = 77


def describe(shape: Shape, dtype: torch.dtype) -> Any:
    """ComfyUI's description of a model of this shape, from which it makes one."""
    config = {**shape.config, "dtype": dtype}
    if shape.config is UNET_CONFIG:
        described: Any = DemoModelConfig(config)
    else:
        family = comfy.supported_models.SDXL if shape.config["adm_in_channels"] else comfy.supported_models.SD15
        heads = {} if shape.config["model_channels"] == 320 else {"num_heads": 4, "num_head_channels": -1}
        kind = type("RandomModel", (family,), {"unet_extra_config": {**family.unet_extra_config, **heads}})
        described = kind(config)
    described.unet_config["dtype"] = dtype
    return described


def random_model(shape: Shape, dtype: torch.dtype) -> Any:
    """A MODEL with random weights of ``dtype`` (a ModelPatcher; its weights load to the device as ComfyUI decides)."""
    load, offload = comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
    model = describe(shape, dtype).get_model({}, "", device=load)
    randomise(model.diffusion_model)
    return comfy.model_patcher.ModelPatcher(model, load_device=load, offload_device=offload)


def random_heads(model: Any, shape: Shape, count: int) -> list[ReadoutHead]:
    """Spatial heads of the authors' size."""
    return [
        new_head("spatial", backbone_of(model), name=f"head {k}", output_channels=3, projection=shape.projection, seed=k)
        for k in range(count)
    ]


def random_target(heads: list[ReadoutHead], latent: Tensor, end_percent: float) -> Target | None:
    """A target of each head, with one random control picture."""
    picture = torch.rand(1, *latent.shape[-2:], 3, generator=torch.Generator().manual_seed(0))
    target = None
    for head in heads:
        target = Target(head=head, image=picture, end_percent=end_percent, previous=target)
    return target


def random_conds(model: Any, shape: Shape, seed: int) -> list:
    """A prompt of 77 tokens, as CONDITIONING."""
    generator = torch.Generator().manual_seed(seed)
    more = {"pooled_output": torch.randn(1, 1280, generator=generator)} if shape.config["adm_in_channels"] else {}
    return [[torch.randn(1, TOKENS, shape.config["context_dim"], generator=generator), more]]


def control_network(shape: Shape, dtype: torch.dtype) -> nn.Module:
    """A ControlNet of the network's own shape, without weights."""
    names = ("model_channels", "num_res_blocks", "channel_mult", "transformer_depth", "transformer_depth_middle",
             "context_dim", "use_linear_in_transformer", "adm_in_channels", "in_channels", "image_size", "legacy",
             "use_spatial_transformer", "use_checkpoint", "num_classes")  # fmt: skip
    config = {name: shape.config[name] for name in names if name in shape.config}
    heads = {"num_head_channels": 64} if shape.config["adm_in_channels"] else {"num_heads": 8, "num_head_channels": -1}
    device = comfy.model_management.get_torch_device()
    return comfy.cldm.cldm.ControlNet(
        **config, **heads, hint_channels=3, dtype=dtype, device=device, operations=comfy.ops.disable_weight_init
    )


def with_controlnet(prompts: Sequence[list], shape: Shape, dtype: torch.dtype) -> list[list]:
    """The prompts with one ControlNet of the network's own shape, random weights and a random control picture."""
    network = control_network(shape, dtype)
    randomise(network)
    control = comfy.controlnet.ControlNet(network, load_device=comfy.model_management.get_torch_device())
    side = 8 * shape.cells
    hint = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    control = control.copy().set_cond_hint(hint, 1.0, (0.0, 1.0))
    added = {"control": control, "control_apply_to_uncond": True}
    return [[[context, {**more, **added}] for context, more in conds] for conds in prompts]


def zero_latent(shape: Shape, pictures: int) -> Tensor:
    return torch.zeros(pictures, shape.config["in_channels"], shape.cells, shape.cells)


def randomise(network: nn.Module, *, seed: int = 0, scale: float = 0.8) -> None:
    """Weights for ComfyUI's uninitialised layers: a layer's outputs are about ``scale`` times as large as its inputs."""
    device = next(network.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    for name, p in network.named_parameters():
        p.requires_grad_(False)
        if p.ndim > 1:
            p.copy_(torch.randn(p.shape, generator=generator, device=device) * (scale / p[0].numel() ** 0.5))
        else:
            p.fill_(1.0 if name.endswith("weight") else 0.0)
