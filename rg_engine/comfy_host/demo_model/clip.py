"""The demo world's picture-text pair, of ComfyUI's own CLIP classes: a CLIP_VISION and a CLIP that share a space.

CLIP's losses run on it as they do on ViT-L/14. Its patches are embedded by a few convolutions, which learn from far fewer
pictures than one large one does (arXiv 2106.14881).
"""

from __future__ import annotations

import functools
import json
from typing import Any

import comfy.clip_model
import comfy.clip_vision
import comfy.ops
import comfy.sd
import comfy.sd1_clip
import torch
from comfy.ldm.modules.attention import attention_pytorch
from torch import Tensor, nn
from torch.nn import functional as F

from ...demo import CLIP, CLIP_VISION
from ...demo.text import MAX_TOKENS, WORDS
from .files import fill, load
from .text import weighted_tokens

NAME = "demo"
START, END = len(WORDS), len(WORDS) + 1
LENGTH = MAX_TOKENS + 2
SPECIAL = {"start": START, "end": END, "pad": 0}
TEXT = {
    "eos_token_id": END, "hidden_act": "gelu", "hidden_size": 96, "intermediate_size": 384,
    "max_position_embeddings": LENGTH, "num_attention_heads": 4, "num_hidden_layers": 2,
}  # fmt: skip


def load_demo_clip() -> tuple[Any, Any]:
    """CLIP_VISION and CLIP. Raises ModelWorldError if the file is missing or damaged."""
    state = load(CLIP)
    vision = comfy.clip_vision.ClipVisionModel(CLIP_VISION)
    _embed_by_convolutions(vision.model, comfy.ops.manual_cast, vision.dtype)
    fill(vision.model, state, "vision.", CLIP)
    clip = comfy.sd.CLIP(_PairTarget)
    fill(getattr(clip.cond_stage_model, f"clip_{NAME}").transformer, state, "text.", CLIP)
    return vision, clip


def token_rows(text: str) -> list[tuple[int, float]]:
    """LENGTH token ids with weights: start, the words, end, padding."""
    words = weighted_tokens(text)[:MAX_TOKENS]
    return [(START, 1.0), *words, (END, 1.0)] + [(0, 1.0)] * (MAX_TOKENS - len(words))


def tokens_of(text: str) -> list[int]:
    return [token for token, _ in token_rows(text)]


def _text_model(config: dict, dtype: Any, device: Any, operations: Any) -> Any:
    model = comfy.clip_model.CLIPTextModel(config, dtype, device, operations)
    words = operations.Embedding(len(WORDS) + 2, config["hidden_size"], dtype=dtype, device=device)
    model.set_input_embeddings(words)  # ComfyUI's are always 49408
    return model


def _embed_by_convolutions(model: Any, operations: Any, dtype: Any) -> None:
    """In the place of CLIPVisionModelProjection's one convolution."""
    embeddings = model.vision_model.embeddings
    width, device = embeddings.patch_embedding.out_channels, embeddings.patch_embedding.weight.device
    embeddings.patch_embedding = Patches(width, operations, dtype, device)


class Patches(nn.Module):
    """Pictures (B, 3, H, W) to patches of 8 pixels, (B, width, H / 8, W / 8)."""

    def __init__(self, width: int, operations: Any, dtype: Any, device: Any) -> None:
        super().__init__()
        conv = functools.partial(operations.Conv2d, dtype=dtype, device=device)
        half = functools.partial(conv, kernel_size=4, stride=2, padding=1)
        self.first, self.second, self.third = half(3, 24), half(24, 48), half(48, width)
        self.norm = operations.GroupNorm(8, 48, dtype=dtype, device=device)
        self.inner, self.outer = (conv(48, 48, kernel_size=3, padding=1) for _ in range(2))

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.second(F.silu(self.first(pixels)))
        x = x + self.outer(F.silu(self.inner(F.silu(self.norm(x)))))
        return self.third(F.silu(x))


class _Tokenizer:
    def __init__(self, embedding_directory: Any = None, tokenizer_data: Any = None) -> None:
        pass

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **_options: Any) -> dict[str, list]:
        return {NAME: [[(t, w, 0) if return_word_ids else (t, w) for t, w in token_rows(text)]]}

    def state_dict(self) -> dict:
        return {}


class _PairTarget:
    params: dict = {}
    tokenizer = _Tokenizer
    clip = functools.partial(
        comfy.sd1_clip.SD1ClipModel,
        clip_name=NAME,
        clip_model=functools.partial(
            comfy.sd1_clip.SDClipModel, max_length=LENGTH, textmodel_json_config=TEXT, special_tokens=SPECIAL,
            model_class=_text_model,
        ),
    )  # fmt: skip


class Pair(nn.Module):
    """Both with fresh weights, for training them together."""

    def __init__(self) -> None:
        super().__init__()
        operations = comfy.ops.disable_weight_init
        settings = json.loads(CLIP_VISION.read_text(encoding="utf-8"))
        self.vision = comfy.clip_model.CLIPVisionModelProjection(settings, torch.float32, "cpu", operations)
        _embed_by_convolutions(self.vision, operations, torch.float32)
        self.text = _text_model(TEXT, torch.float32, "cpu", operations)
        for module in self.modules():  # ComfyUI's layers come uninitialised
            for kind in (nn.Conv2d, nn.Linear, nn.LayerNorm, nn.GroupNorm):
                if isinstance(module, kind):
                    kind.reset_parameters(module)  # type: ignore[arg-type]
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.1)
        nn.init.normal_(self.vision.vision_model.embeddings.class_embedding, std=0.1)
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())
        self.requires_grad_(True)

    def pictures(self, values: Tensor) -> Tensor:
        """Features (B, D) of normalised pictures (B, 3, 64, 64)."""
        model = self.vision.vision_model
        x = _encode(model.encoder, model.pre_layrnorm(model.embeddings(values)), None)
        return self.vision.visual_projection(model.post_layernorm(x[:, 0]))

    def texts(self, tokens: Tensor) -> Tensor:
        """Features (T, D) of captions' tokens (T, LENGTH)."""
        model = self.text.text_model
        mask = torch.full((LENGTH, LENGTH), -torch.inf, device=tokens.device).triu(1)
        x = model.final_layer_norm(_encode(model.encoder, model.embeddings(tokens), mask))
        return self.text.text_projection(x[torch.arange(len(tokens)), (tokens == END).int().argmax(1)])


def _encode(encoder: Any, x: Tensor, mask: Tensor | None) -> Tensor:
    """As CLIPEncoder does, but for its writing in place, which backward refuses."""
    for layer in encoder.layers:
        x = x + layer.self_attn(layer.layer_norm1(x), mask, attention_pytorch)
        x = x + layer.mlp(layer.layer_norm2(x))
    return x
