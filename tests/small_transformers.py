"""Small transformers of every family that this ComfyUI has, with random weights, made as ComfyUI makes them."""

# ruff: noqa: C408 (keywords are the settings as the networks name them)
from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import torch
from small_models import patcher

WORDS = 24  # the prompts' width
PROMPT = 7  # tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Small:
    """A family: ComfyUI's class, its network's settings, the latent's shape, what else its prompts hold, and references."""

    model: str
    config: Mapping[str, Any]
    latent: tuple[int, ...] = (16, 12, 16)
    pooled: int = 0
    references: tuple[tuple[int, ...], ...] = ()
    mask: bool = False
    more: str = ""
    blind: bool = False  # its kernels are ComfyUI's own in every version: no fp64


_FLUX = dict(
    image_model="flux", in_channels=16, out_channels=16, patch_size=2, vec_in_dim=32, context_in_dim=WORDS, hidden_size=64,
    mlp_ratio=4.0, num_heads=2, depth=3, depth_single_blocks=3, axes_dim=[8, 12, 12], theta=10000, qkv_bias=True,
    guidance_embed=True, txt_ids_dims=[],
)  # fmt: skip
_FLUX2 = dict(
    _FLUX, image_model="flux2", axes_dim=[8, 8, 8, 8], mlp_ratio=3.0, theta=2000, in_channels=128, out_channels=128,
    global_modulation=True, mlp_silu_act=True, qkv_bias=False, ops_bias=False, default_ref_method="index",
    ref_index_scale=10.0, txt_ids_dims=[3], patch_size=1, vec_in_dim=None,
)  # fmt: skip
_LUMINA = dict(
    image_model="lumina2", patch_size=2, in_channels=16, cap_feat_dim=WORDS, n_layers=4, qk_norm=True, n_heads=8,
    n_kv_heads=4, axes_dims=[8, 12, 12], axes_lens=[300, 512, 512], rope_theta=10000.0, ffn_dim_multiplier=1.0, dim=256,
    multiple_of=64,
)  # fmt: skip
_ZIMAGE = dict(
    _LUMINA, n_kv_heads=8, z_image_modulation=True, time_scale=1000.0, pad_tokens_multiple=32, rope_theta=256.0
)  # fmt: skip
_QWEN = dict(
    image_model="qwen_image", in_channels=64, num_layers=4, attention_head_dim=32, num_attention_heads=2,
    joint_attention_dim=WORDS, axes_dims_rope=(8, 12, 12),
)  # fmt: skip
_WAN = dict(
    image_model="wan2.1", model_type="t2v", dim=96, ffn_dim=192, num_heads=4, num_layers=4, text_dim=WORDS, freq_dim=64,
    in_dim=16, out_dim=16, patch_size=(1, 2, 2), qk_norm=True, cross_attn_norm=True,
)  # fmt: skip
_SD3 = dict(
    in_channels=16, patch_size=2, depth=2, num_blocks=4, input_size=None, adm_in_channels=32, num_patches=576,
    context_embedder_config=dict(target="torch.nn.Linear", params=dict(in_features=WORDS, out_features=128)),
    pos_embed_max_size=24, pos_embed_scaling_factor=None, x_block_self_attn_layers=[],
)  # fmt: skip
FAMILIES = {
    "sd3": Small(model="SD3", config=_SD3, pooled=32),
    "sd3.5-m": Small(model="SD3", config=dict(_SD3, qk_norm="rms", x_block_self_attn_layers=[0, 1, 2]), pooled=32),
    "flux": Small(model="Flux", config=_FLUX, pooled=32),
    "schnell": Small(model="FluxSchnell", config=dict(_FLUX, guidance_embed=False), pooled=32),
    "kontext": Small(model="Flux", config=_FLUX, pooled=32, references=((16, 8, 10),)),
    "flux2": Small(model="Flux2", config=_FLUX2, latent=(128, 6, 8), pooled=32),
    "flux2 with a reference": Small(model="Flux2", config=_FLUX2, latent=(128, 6, 8), pooled=32, references=((128, 4, 5),)),
    "chroma": Small(
        model="Chroma", pooled=32,
        config=dict(
            image_model="chroma", in_channels=64, out_channels=64, context_in_dim=WORDS, hidden_size=64, mlp_ratio=4.0,
            num_heads=2, depth=3, depth_single_blocks=3, axes_dim=[8, 12, 12], theta=10000, patch_size=2, qkv_bias=True,
            in_dim=64, out_dim=64, hidden_dim=48, n_layers=2, txt_ids_dims=[], vec_in_dim=None,
        ),
    ),
    "lumina2": Small(model="Lumina2", config=_LUMINA, mask=True),
    "z-image": Small(model="ZImage", config=_ZIMAGE, mask=True),
    "z-image omni": Small(
        model="ZImage", config=dict(_ZIMAGE, siglip_feat_dim=20), references=((16, 8, 10),), mask=True,
        more="siglip_feat_dim",
    ),
    "qwen-image": Small(model="QwenImage", config=_QWEN, latent=(16, 1, 12, 16), mask=True),
    "qwen-edit": Small(model="QwenImage", config=_QWEN, latent=(16, 1, 12, 16), references=((16, 1, 8, 10),), mask=True),
    "wan2.1": Small(model="WAN21_T2V", config=_WAN, latent=(16, 1, 12, 16)),
    "wan2.2": Small(model="WAN22_T2V", config=dict(_WAN, in_dim=48, out_dim=48), latent=(48, 1, 12, 16)),
    "auraflow": Small(
        model="AuraFlow", latent=(4, 12, 16),
        config=dict(cond_seq_dim=WORDS, n_double_layers=2, n_layers=4, dim=64, n_heads=2, global_conddim=64, max_seq=256),
    ),
    "pixart": Small(
        model="PixArtSigma", latent=(4, 32, 40),
        config=dict(
            image_model="pixart_sigma", num_heads=4, patch_size=2, hidden_size=72, in_channels=4, depth=4,
            caption_channels=WORDS, model_max_length=9, micro_condition=False, input_size=32, pe_interpolation=1,
        ),
    ),
    "hidream": Small(
        model="HiDream", pooled=32, more="llama",
        config=dict(
            image_model="hidream", attention_head_dim=32, axes_dims_rope=[16, 8, 8], caption_channels=[WORDS, WORDS],
            max_resolution=[128, 128], in_channels=16, llama_layers=[0, 1, 1, 2], num_attention_heads=2,
            num_routed_experts=4, num_activated_experts=2, num_layers=2, num_single_layers=2, out_channels=16, patch_size=2,
            text_emb_dim=32,
        ),
    ),
    "hunyuan-dit": Small(
        model="HunyuanDiT", latent=(4, 12, 16), pooled=1024, more="hydit",
        config=dict(
            image_model="hydit", depth=4, hidden_size=96, num_heads=4, text_states_dim=WORDS, text_states_dim_t5=WORDS
        ),
    ),
    "omnigen2": Small(
        model="Omnigen2", mask=True,
        config=dict(
            image_model="omnigen2", patch_size=2, in_channels=16, hidden_size=64, num_layers=4, num_refiner_layers=1,
            num_attention_heads=2, num_kv_heads=1, multiple_of=32, axes_dim_rope=(8, 12, 12), axes_lens=(300, 512, 512),
            text_feat_dim=WORDS,
        ),
    ),
    "cosmos": Small(
        model="CosmosT2IPredict2", latent=(16, 1, 12, 16), blind=True,
        config=dict(
            image_model="cosmos_predict2", max_img_h=240, max_img_w=240, max_frames=128, in_channels=16, out_channels=16,
            patch_spatial=2, patch_temporal=1, model_channels=96, concat_padding_mask=True, crossattn_emb_channels=WORDS,
            pos_emb_cls="rope3d", pos_emb_learnable=True, pos_emb_interpolation="crop", min_fps=1, max_fps=30,
            use_adaln_lora=True, adaln_lora_dim=16, num_blocks=4, num_heads=4, extra_per_block_abs_pos_emb=False,
            rope_h_extrapolation_ratio=4.0, rope_w_extrapolation_ratio=4.0, rope_t_extrapolation_ratio=1.0,
            rope_enable_fps_modulation=False,
        ),
    ),
    "krea2": Small(
        model="Krea2",
        config=dict(
            image_model="krea2", features=96, tdim=32, txtdim=8, heads=2, kvheads=1, multiplier=4, layers=4, patch=2,
            channels=16, txtlayers=3, txtheads=1, txtkvheads=1,
        ),
    ),
    "hunyuan-image": Small(
        model="HunyuanImage21", latent=(64, 6, 8),
        config=dict(
            image_model="hunyuan_video", in_channels=64, patch_size=[1, 1], out_channels=64, vec_in_dim=None,
            axes_dim=[16, 16], meanflow=False, context_in_dim=WORDS, hidden_size=64, mlp_ratio=4.0, num_heads=2, depth=2,
            depth_single_blocks=2, theta=256, qkv_bias=True, byt5=False, guidance_embed=False, use_cond_type_embedding=False,
            vision_in_dim=None, meanflow_sum=False,
        ),
    ),
    "ernie": Small(
        model="ErnieImage", latent=(128, 6, 8), blind=True,
        config=dict(
            image_model="ernie", hidden_size=64, num_attention_heads=2, num_layers=4, ffn_hidden_size=128, in_channels=128,
            out_channels=128, patch_size=1, text_in_dim=WORDS, rope_axes_dim=(8, 12, 12),
        ),
    ),
}  # fmt: skip


def is_there(name: str) -> bool:
    """Whether this ComfyUI has the family."""
    import comfy.ldm.lumina.model
    import comfy.supported_models

    small = FAMILIES[name]
    if small.more == "siglip_feat_dim" and not hasattr(comfy.ldm.lumina.model.NextDiT, "embed_all"):
        return False
    return hasattr(comfy.supported_models, small.model)


def transformer(name: str, stored: torch.dtype = torch.float32, computes: torch.dtype | None = None, seed: int = 0) -> Any:
    """A MODEL; stored: what its weights are; computes: in what, if in another (as offloaded and fp8 checkpoints)."""
    import comfy.supported_models

    config = getattr(comfy.supported_models, FAMILIES[name].model)(dict(FAMILIES[name].config))
    config.unet_config["dtype"] = stored
    if computes is not None:
        config.manual_cast_dtype = computes
    model = None
    while model is None:
        try:
            model = config.get_model({}, "")
        except TypeError as error:  # a setting that this version does not have
            unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            if unknown is None or unknown[1] not in config.unet_config:
                raise
            del config.unet_config[unknown[1]]
    _randomise(model.diffusion_model, seed)
    return patcher(model.eval().requires_grad_(False))


def _randomise(network: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        drawn = torch.randn(tensor.shape, generator=generator)
        if tensor.ndim > 1 and tensor.shape[-1] > 1:
            tensor.copy_(drawn / tensor[0].numel() ** 0.5)
        else:
            norm = "norm" in name and name.endswith(("weight", "scale"))
            tensor.copy_(1 + 0.2 * drawn if norm else 0.2 * drawn)


def zero_latent(name: str, batch: int = 1) -> torch.Tensor:
    return torch.zeros(batch, *FAMILIES[name].latent)


def prompt(name: str, seed: int) -> list:
    """A CONDITIONING as this family's text encoders give it."""
    small, generator = FAMILIES[name], torch.Generator().manual_seed(seed)
    tokens = 77 if small.more == "hydit" else PROMPT + 2 * (seed % 2)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    facts: dict[str, Any] = {"guidance": 3.5}
    if small.pooled:
        facts["pooled_output"] = random(1, small.pooled)
    if small.references:
        facts["reference_latents"] = [random(1, *shape) for shape in small.references]
    if small.mask:
        facts["attention_mask"] = torch.ones(1, tokens, dtype=torch.int64)
    if small.more == "llama":
        facts["conditioning_llama3"] = random(1, 3, tokens, WORDS)
    if small.more == "hydit":
        facts |= {
            "attention_mask": torch.ones(1, 77), "conditioning_mt5xl": random(1, 256, WORDS),
            "attention_mask_mt5xl": torch.ones(1, 256), "width": 128, "height": 96,
        }  # fmt: skip
    return [[random(1, tokens, WORDS), facts]]
