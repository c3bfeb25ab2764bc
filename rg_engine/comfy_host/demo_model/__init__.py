"""The embedded demo model as ComfyUI's own objects: MODEL, CLIP and VAE."""

from __future__ import annotations

from typing import Any, Literal, get_args

import comfy.model_management
import comfy.model_patcher

from .latent import DemoVAE
from .text import load_clip
from .transformer import TransformerDenoiser, load_transformer
from .unet import Denoiser, load_unet

#: What may predict the noise. Both read the same text and make latents of the same autoencoder.
Network = Literal["UNet", "transformer"]
NETWORKS: tuple[Network, ...] = get_args(Network)

__all__ = ["NETWORKS", "DemoVAE", "Denoiser", "Network", "TransformerDenoiser", "load_demo_model"]


def load_demo_model(network: Network = "UNet") -> tuple[Any, Any, Any]:
    """MODEL, CLIP and VAE. Raises ModelWorldError if a file is missing or damaged."""
    load_device, offload_device = comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
    model = (load_unet if network == "UNet" else load_transformer)(offload_device)
    patcher = comfy.model_patcher.ModelPatcher(model, load_device=load_device, offload_device=offload_device)
    return patcher, load_clip(), DemoVAE()
