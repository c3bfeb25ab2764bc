"""The autoencoder behind ComfyUI's VAE nodes, and what its latents are."""

from __future__ import annotations

import comfy.latent_formats
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import torch

from ...demo import AUTOENCODER
from ...demo.autoencoder import LATENT_CHANNELS, Autoencoder
from .files import fill, load

#: Latents to RGB in -1..1 for previews, fitted by least squares on 800 pictures.
PREVIEW_FACTORS = [
    [0.111, 0.038, 0.074], [-0.145, -0.034, -0.078], [0.002, -0.066, -0.039], [0.051, -0.102, -0.093],
    [0.079, -0.015, 0.005], [-0.099, -0.058, 0.084], [0.093, 0.056, -0.033], [-0.071, -0.079, -0.039],
]  # fmt: skip
PREVIEW_BIAS = [0.295, 0.279, 0.218]


class DemoLatent(comfy.latent_formats.LatentFormat):
    """Latents as the autoencoder gives them: 8 channels of mean 0 and deviation 1."""

    latent_channels = LATENT_CHANNELS
    scale_factor = 1.0
    latent_rgb_factors = PREVIEW_FACTORS
    latent_rgb_factors_bias = PREVIEW_BIAS


class DemoVAE(comfy.sd.VAE):
    """The autoencoder behind ComfyUI's VAE nodes."""

    def __init__(self) -> None:
        tiny = {"double_z": True, "z_channels": 4, "resolution": 32, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1],
                "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0}  # fmt: skip
        # ComfyUI's own set-up around a placeholder, so that every attribute of every version is there.
        params = {"ddconfig": tiny, "embed_dim": 4}
        placeholder = comfy.sd.AutoencoderKL(**params).state_dict()
        super().__init__(sd=placeholder, config={"params": params}, dtype=torch.float32)
        model = Autoencoder()
        fill(model, load(AUTOENCODER), "", AUTOENCODER)
        self.first_stage_model = model.eval().requires_grad_(False)
        self.latent_channels = LATENT_CHANNELS
        self.memory_used_encode = lambda shape, dtype: 400 * shape[2] * shape[3]
        self.memory_used_decode = lambda shape, dtype: 400 * shape[2] * shape[3] * 64
        self.patcher = comfy.model_patcher.ModelPatcher(
            self.first_stage_model, load_device=self.device, offload_device=comfy.model_management.vae_offload_device()
        )
