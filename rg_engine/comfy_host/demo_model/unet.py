"""The demo model's UNet, of SD1.5's kind, predicting v."""

from __future__ import annotations

from typing import Any

import comfy.model_base
import comfy.supported_models
from torch import Tensor, nn

from ...demo import DENOISER
from ...demo.autoencoder import LATENT_CHANNELS
from ...demo.text import WIDTH, TextEncoder
from .files import fill, load
from .latent import DemoLatent

UNET_CONFIG = {
    "image_size": 16,
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "model_channels": 64,
    "num_res_blocks": [1, 1, 1],
    "channel_mult": [1, 1, 2],
    "transformer_depth": [0, 1, 1],
    "transformer_depth_output": [0, 0, 1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "context_dim": WIDTH,
    "use_spatial_transformer": True,
    "legacy": False,
    "use_checkpoint": False,
    "use_linear_in_transformer": False,
    "adm_in_channels": None,
    "use_temporal_attention": False,
}


class DemoModelConfig(comfy.supported_models.SD15):
    """SD1.5's kind of model (its UNet and noise schedule, predicting v), small."""

    unet_config = UNET_CONFIG
    unet_extra_config = {"num_heads": 4, "num_head_channels": -1}
    latent_format = DemoLatent

    def model_type(self, state_dict: dict, prefix: str = "") -> Any:
        return comfy.model_base.ModelType.V_PREDICTION

    def inpaint_model(self) -> bool:
        """ComfyUI takes more than 4 channels for an inpainting model's."""
        return False


def load_unet(device: Any) -> Any:
    """ComfyUI's model on a device."""
    model = DemoModelConfig(UNET_CONFIG).get_model({}, "", device=device)
    fill(model.diffusion_model, load(DENOISER), "unet.", DENOISER)
    return model


class Denoiser(nn.Module):
    """The UNet with fresh weights and its text encoder, for training them together."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = DemoModelConfig(UNET_CONFIG).get_model({}, "").diffusion_model
        for module in self.unet.modules():  # ComfyUI's layers come uninitialised
            for kind in (nn.Conv2d, nn.Linear, nn.GroupNorm, nn.LayerNorm):
                if isinstance(module, kind):
                    kind.reset_parameters(module)  # type: ignore[arg-type]
        for name, module in self.unet.named_modules():
            if name.endswith(("out_layers.3", "proj_out")) or name == "out.2":  # residual branches begin at zero
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)
        self.unet.float().requires_grad_(True)
        self.text = TextEncoder()

    def predict(self, z: Tensor, timestep: Tensor, tokens: Tensor) -> Tensor:
        """v of VP latents z (B, C, h, w) at timestep (B,) under captions' tokens (B, 16)."""
        return self.unet(z, timestep, context=self.text(tokens))
