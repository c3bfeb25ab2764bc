"""The demo model's transformer, of Lumina 2's kind, predicting a flow's velocity."""

from __future__ import annotations

import inspect
from typing import Any

import comfy.supported_models
import torch
from comfy.ldm.lumina.model import NextDiT
from torch import Tensor, nn

from ...demo import TRANSFORMER
from ...demo.autoencoder import LATENT_CHANNELS
from ...demo.text import MAX_TOKENS, WIDTH
from .files import fill, load
from .latent import DemoLatent

#: What the width of the feed-forward layers is a multiple of: ComfyUI has changed it.
_FEED_FORWARD_WIDTHS = 4.0 if inspect.signature(NextDiT).parameters["ffn_dim_multiplier"].default is None else 1.0
TRANSFORMER_CONFIG = {
    "image_model": "lumina2",
    "patch_size": 2,
    "in_channels": LATENT_CHANNELS,
    "dim": 160,
    "n_layers": 6,
    "n_refiner_layers": 1,
    "n_heads": 5,
    "n_kv_heads": 5,
    "multiple_of": 64,
    "ffn_dim_multiplier": 2.4 / _FEED_FORWARD_WIDTHS,
    "qk_norm": True,
    "cap_feat_dim": WIDTH,
    "axes_dims": [8, 12, 12],
    "axes_lens": [64, 64, 64],
}


class DemoTransformerConfig(comfy.supported_models.Lumina2):
    """Lumina 2's kind of model (its NextDiT, predicting the flow's velocity), small."""

    unet_config = TRANSFORMER_CONFIG
    sampling_settings = {"multiplier": 1.0, "shift": 1.0}
    latent_format = DemoLatent
    supported_inference_dtypes = [torch.float32]


def load_transformer(device: Any) -> Any:
    """ComfyUI's model on a device."""
    model = new_transformer(device)
    weights = load(TRANSFORMER)
    if "norm_final.weight" in model.diffusion_model.state_dict():  # of older ComfyUIs, which don't use it
        weights["network.norm_final.weight"] = torch.ones_like(model.diffusion_model.norm_final.weight)
    fill(model.diffusion_model, weights, "network.", TRANSFORMER)
    return model


def new_transformer(device: Any = None) -> Any:
    """With uninitialised weights."""
    return DemoTransformerConfig(dict(TRANSFORMER_CONFIG)).get_model({}, "", device=device)


class TransformerDenoiser(nn.Module):
    """The transformer with fresh weights, for training it on the frozen text encoder's words."""

    def __init__(self) -> None:
        super().__init__()
        self.network = new_transformer().diffusion_model
        for name, module in self.network.named_modules():  # ComfyUI's layers come uninitialised
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
                if "adaLN_modulation" in name or name == "final_layer.linear":  # residual branches begin at zero
                    nn.init.zeros_(module.weight)
            elif getattr(module, "weight", None) is not None:  # norms
                nn.init.ones_(module.weight)
        self.network.float().requires_grad_(True)

    def predict(self, x: Tensor, sigma: Tensor, context: Tensor) -> Tensor:
        """The velocity noise - latent of x (B, C, h, w) at sigma (B,) in 0..1 under words (B, 16, 96)."""
        options = {"optimized_attention_override": _attention}
        return self.network(x, sigma, context, num_tokens=MAX_TOKENS, transformer_options=options)


def _attention(_chosen: Any, q: Tensor, k: Tensor, v: Tensor, *_args: Any, **_options: Any) -> Tensor:
    """Attention of a few tokens, q, k, v (B, heads, L, d): written out it trains faster on a CPU than any fused kernel."""
    shares = torch.softmax((q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5, dim=-1)
    return (shares.to(v.dtype) @ v).transpose(1, 2).flatten(2)
