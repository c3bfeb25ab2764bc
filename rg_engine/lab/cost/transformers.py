"""Transformers at their real sizes, whose operations and bytes are counted on tensors without numbers."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import comfy.supported_models
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ...comfy_host.loaded.gradient_scope import GradientScope, Graph
from ...comfy_host.loaded.memory import graph_elements
from ...comfy_host.loaded.saved_tensors import beside_other_nodes
from ...features import FeatureTap, detect_backbone
from ...guidance import GuidanceSettings
from ...heads import aggregation
from ...training import new_head
from .operations import Operations, count_kept_bytes

HEAD = 384  # the authors' width


@dataclasses.dataclass(frozen=True, kw_only=True)
class BigTransformer:
    """model: ComfyUI's class; config: of its network; latent: the shape of one picture's; text: tokens and their width;
    more: shapes of what else its network takes, and numbers."""

    model: str
    config: Mapping[str, Any]
    latent: tuple[int, ...]
    text: tuple[int, int]
    more: Mapping[str, Any] = dataclasses.field(default_factory=dict)


_FLUX = {
    "image_model": "flux", "in_channels": 16, "out_channels": 16, "patch_size": 2, "vec_in_dim": 768, "context_in_dim": 4096,
    "hidden_size": 3072, "mlp_ratio": 4.0, "num_heads": 24, "depth": 19, "depth_single_blocks": 38, "axes_dim": [16, 56, 56],
    "theta": 10000, "qkv_bias": True, "guidance_embed": True, "txt_ids_dims": [],
}  # fmt: skip
#: A picture of 1024 x 1024 pixels; Wan's of 1280 x 704.
BIG = {
    "sd3-m": BigTransformer(
        model="SD3", latent=(16, 128, 128), text=(154, 4096), more={"y": (2048,)},
        config={
            "in_channels": 16, "patch_size": 2, "depth": 24, "input_size": None, "adm_in_channels": 2048,
            "num_patches": 36864, "pos_embed_max_size": 192, "pos_embed_scaling_factor": None,
            "x_block_self_attn_layers": [],
            "context_embedder_config": {
                "target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 1536},
            },
        },
    ),
    "flux-dev": BigTransformer(
        model="Flux", config=_FLUX, latent=(16, 128, 128), text=(256, 4096), more={"y": (768,), "guidance": ()}
    ),
    "flux.2-klein": BigTransformer(
        model="Flux2", latent=(128, 64, 64), text=(512, 7680),
        config={
            **_FLUX, "image_model": "flux2", "axes_dim": [32] * 4, "mlp_ratio": 3.0, "theta": 2000, "in_channels": 128,
            "out_channels": 128, "global_modulation": True, "mlp_silu_act": True, "qkv_bias": False, "ops_bias": False,
            "default_ref_method": "index", "ref_index_scale": 10.0, "txt_ids_dims": [3], "patch_size": 1,
            "vec_in_dim": None, "depth": 5, "depth_single_blocks": 20, "context_in_dim": 7680, "guidance_embed": False,
        },
    ),
    "z-image": BigTransformer(
        model="ZImage", latent=(16, 128, 128), text=(64, 2560), more={"num_tokens": 64},
        config={
            "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "cap_feat_dim": 2560, "n_layers": 30,
            "qk_norm": True, "n_heads": 30, "n_kv_heads": 30, "axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512],
            "rope_theta": 256.0, "ffn_dim_multiplier": 8 / 3, "dim": 3840, "multiple_of": 256, "z_image_modulation": True,
            "time_scale": 1000.0, "pad_tokens_multiple": 32,
        },
    ),
    "qwen-image": BigTransformer(
        model="QwenImage", latent=(16, 1, 128, 128), text=(64, 3584),
        config={
            "image_model": "qwen_image", "in_channels": 64, "num_layers": 60, "attention_head_dim": 128,
            "num_attention_heads": 24, "joint_attention_dim": 3584, "axes_dims_rope": (16, 56, 56),
        },
    ),
    "wan2.2-5b": BigTransformer(
        model="WAN22_T2V", latent=(48, 1, 44, 80), text=(512, 4096),
        config={
            "image_model": "wan2.1", "model_type": "t2v", "dim": 3072, "ffn_dim": 14336, "num_heads": 24, "num_layers": 30,
            "text_dim": 4096, "freq_dim": 256, "in_dim": 48, "out_dim": 48, "patch_size": (1, 2, 2), "qk_norm": True,
            "cross_attn_norm": True,
        },
    ),
}  # fmt: skip


def transformer_table(name: str) -> list[dict[str, Any]]:
    """A row a way of making a step of one prompt: its operations over a plain step's, bytes that the network's graph keeps,
    as CUDA's kernels keep them, and what memory.py takes it for (with the block that runs again, where there is one)."""
    big, rows = BIG[name], []
    ways: tuple[tuple[str, Graph, int], ...] = (
        ("fast", "full", 1), ("fast, 3 heads", "full", 3), ("fast, light graph", "light", 1)
    )  # fmt: skip
    for way, graph, heads in ways:
        with _counting():
            block, kept, expected = _kept(big, graph)
        with _counting():
            operations, of_head = _operations(big, graph, heads)
        rows.append(
            {
                "a step": way, "read at": block, "operations": round(operations, 3), "GB kept": round(kept / 1e9, 2),
                "GB expected": round(expected / 1e9, 2), "MB of a head": round(of_head / 1e6),
            }
        )  # fmt: skip
    return rows


@contextlib.contextmanager
def _counting() -> Iterator[None]:
    aggregation.interpolation.cache_clear()  # of tensors with numbers
    try:
        with FakeTensorMode(), torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        aggregation.interpolation.cache_clear()  # of tensors without numbers


def _kept(big: BigTransformer, graph: Graph) -> tuple[str, int, float]:
    """The block that is read, bytes kept for backward between the passes, and the bytes that memory.py reckons with."""
    device = torch.device("cuda")
    network = _network(big, device)
    backbone = detect_backbone(network)
    x = _fake(big.latent, device).requires_grad_()
    ignored = (*network.parameters(), *network.buffers())
    with GradientScope(network, graph, backbone), FeatureTap(network, backbone), count_kept_bytes(*ignored) as most:
        _run(network, big, x, _flash)
    return backbone.taps[0], most[0], 2 * graph_elements(backbone, (1, *big.latent), graph, big.text[0])


def _operations(big: BigTransformer, graph: Graph, heads: int) -> tuple[float, int]:
    """Multiply-adds of a guided step of one prompt over a plain one's, and bytes that a head keeps."""
    device = torch.device("cpu")  # tensors without numbers have a backward there
    network = _network(big, device)
    backbone = detect_backbone(network)
    with torch.no_grad(), Operations() as plain:
        _run(network, big, _fake(big.latent, device), _fused)
    x = _fake(big.latent, device).requires_grad_()
    scope = GradientScope(network, graph, backbone)
    with scope, beside_other_nodes(), FeatureTap(network, backbone) as tap, Operations() as guided:
        _run(network, big, x, _fused)
        maps, _ = tap.take()
        torch.autograd.grad(maps, x, [torch.empty_like(map_) for map_ in maps])
    head = new_head("spatial", backbone, name="counted", output_channels=3, projection=HEAD).network
    copies = [map_.detach().requires_grad_() for map_ in maps]
    with Operations() as read, count_kept_bytes(*head.parameters(), *copies) as kept:
        readout = head(copies, torch.empty(1, backbone.emb_width), big.latent[-2:], light=graph == "light")
        torch.autograd.grad(readout, copies, torch.empty_like(readout))
    return (guided.count + heads * GuidanceSettings().head_runs * read.count) / plain.count, kept[0]


def _run(network: nn.Module, big: BigTransformer, x: Tensor, attention: Any) -> None:
    more = {key: _fake(value, x.device) if isinstance(value, tuple) else value for key, value in big.more.items()}
    network(
        x, torch.full((1,), 0.5, device=x.device), context=_fake(big.text, x.device),
        transformer_options={"optimized_attention_override": attention}, **more,
    )  # fmt: skip


def _fake(shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.empty(1, *shape, dtype=torch.bfloat16, device=device)


def _network(big: BigTransformer, device: torch.device) -> nn.Module:
    """ComfyUI's network in bf16, without the settings that this version does not know."""
    config = getattr(comfy.supported_models, big.model)(dict(big.config))
    config.unet_config["dtype"] = torch.bfloat16
    while True:
        try:
            return config.get_model({}, "", device=device).diffusion_model.requires_grad_(False).eval()
        except TypeError as error:
            unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            if unknown is None or config.unet_config.pop(unknown[1], None) is None:
                raise


def _flash(_chosen: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, *_args: Any, **options: Any) -> Tensor:
    """CUDA's flash attention: it keeps q, k, v, its output and a number a row."""
    return _attention(lambda *qkv: torch.ops.aten._scaled_dot_product_flash_attention(*qkv)[0], q, k, v, heads, options)


def _fused(_chosen: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, *_args: Any, **options: Any) -> Tensor:
    return _attention(_Fused.apply, q, k, v, heads, options)


def _attention(kernel: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, options: dict[str, Any]) -> Tensor:
    if not options.get("skip_reshape"):
        q, k, v = (tensor.reshape(*tensor.shape[:2], heads, -1).transpose(1, 2) for tensor in (q, k, v))
    out = kernel(q, k, v)
    return out if options.get("skip_output_reshape") else out.transpose(1, 2).flatten(2)


class _Fused(torch.autograd.Function):
    """The products of a fused attention kernel: two, and five in backward, as it makes the pairs again."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(q, k, v)
        return (q @ k.mT) @ v

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        q, k, v = ctx.saved_tensors
        pairs, moved = q @ k.mT, gradient @ v.mT
        return moved @ k, moved.mT @ q, pairs.mT @ gradient
