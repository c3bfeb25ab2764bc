"""The embedded demo model as ComfyUI's own objects: MODEL, CLIP and VAE."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..demo import AUTOENCODER, DENOISER
from ..demo.autoencoder import LATENT_CHANNELS, Autoencoder
from ..demo.text import WIDTH, TextEncoder, pad, tokenize
from ..errors import ModelWorldError

log = logging.getLogger("readout_guidance")

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


def load_demo_model() -> tuple[Any, Any, Any]:
    """MODEL, CLIP and VAE. Raises ModelWorldError if a file is missing or damaged."""
    denoiser = _load(DENOISER)
    load_device, offload_device = comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
    model = DemoModelConfig(UNET_CONFIG).get_model({}, "", device=offload_device)
    _fill(model.diffusion_model, denoiser, "unet.", DENOISER)
    patcher = comfy.model_patcher.ModelPatcher(model, load_device=load_device, offload_device=offload_device)
    clip = comfy.sd.CLIP(_ClipTarget)
    _fill(clip.cond_stage_model.encoder, denoiser, "text.", DENOISER)
    return patcher, clip, DemoVAE()


class _DemoTokenizer:
    """Text to token ids with weights, in ComfyUI's shape; words outside the vocabulary are named in the log."""

    def __init__(self, embedding_directory: Any = None, tokenizer_data: Any = None) -> None:
        pass

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **_options: Any) -> dict[str, list]:
        found: list[tuple[int, float]] = []
        escaped = comfy.sd1_clip.escape_important(text)
        strange: list[str] = []
        for part, weight in comfy.sd1_clip.token_weights(escaped, 1.0):
            known, unknown = tokenize(comfy.sd1_clip.unescape_important(part))
            found += [(token, weight) for token in known]
            strange += unknown
        if strange:
            log.warning("The demo model does not know the words: %s", ", ".join(dict.fromkeys(strange)))
        tokens = pad([token for token, _ in found][:16])
        weights = [weight for _, weight in found][:16]
        weights += [1.0] * (len(tokens) - len(weights))
        row = [(t, w, 0) if return_word_ids else (t, w) for t, w in zip(tokens, weights, strict=True)]
        return {"demo": [row]}

    def state_dict(self) -> dict:
        return {}


class _DemoClip(nn.Module):
    """The text encoder with the methods that ComfyUI's CLIP calls."""

    def __init__(self, dtype: Any = None, device: Any = None, model_options: Any = None) -> None:
        super().__init__()
        self.encoder = TextEncoder().to(device).eval().requires_grad_(False)
        self.dtypes = {torch.float32}

    def reset_clip_options(self) -> None:
        pass

    def set_clip_options(self, options: dict) -> None:
        pass

    def encode_token_weights(self, tokens: dict[str, list]) -> tuple[Tensor, Tensor]:
        device = self.encoder.places.device
        (row,) = tokens["demo"]
        ids = torch.tensor([[token for token, *_ in row], [0] * len(row)], device=device)
        words, empty = self.encoder(ids)
        weights = torch.tensor([weight for _, weight, *_ in row], device=device)[:, None]
        weighted = (empty + weights * (words - empty))[None]  # as ComfyUI weights words: away from the empty prompt
        out = weighted.to(comfy.model_management.intermediate_device())
        return out, out.mean(1)

    def load_sd(self, sd: dict) -> Any:
        return self.load_state_dict(sd, strict=False)


class _ClipTarget:
    clip = _DemoClip
    tokenizer = _DemoTokenizer
    params: dict = {}


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
        _fill(model, _load(AUTOENCODER), "", AUTOENCODER)
        self.first_stage_model = model.eval().requires_grad_(False)
        self.latent_channels = LATENT_CHANNELS
        self.memory_used_encode = lambda shape, dtype: 400 * shape[2] * shape[3]
        self.memory_used_decode = lambda shape, dtype: 400 * shape[2] * shape[3] * 64
        self.patcher = comfy.model_patcher.ModelPatcher(
            self.first_stage_model, load_device=self.device, offload_device=comfy.model_management.vae_offload_device()
        )


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelWorldError(
            f"the demo model's file {path.name} is missing or damaged ({error}): install the extension again"
        ) from error


def _fill(module: nn.Module, state: dict[str, Tensor], prefix: str, path: Path) -> None:
    wanted = {key[len(prefix) :]: value.float() for key, value in state.items() if key.startswith(prefix)}
    try:
        module.load_state_dict(wanted)
    except RuntimeError as error:
        raise ModelWorldError(f"the demo model's file {path.name} does not fit this version: {error}") from error


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
