"""The text encoder behind ComfyUI's CLIP nodes."""

from __future__ import annotations

import logging
from typing import Any

import comfy.model_management
import comfy.sd
import comfy.sd1_clip
import torch
from torch import Tensor, nn

from ...demo import DENOISER
from ...demo.text import TextEncoder, pad, tokenize
from .files import fill, load

log = logging.getLogger("readout_guidance")


def load_clip() -> Any:
    clip = comfy.sd.CLIP(_ClipTarget)
    fill(clip.cond_stage_model.encoder, load(DENOISER), "text.", DENOISER)
    return clip


def weighted_tokens(text: str) -> list[tuple[int, float]]:
    """Token ids of the words known, with ComfyUI's weights such as (red:1.2); the others are named in the log."""
    found: list[tuple[int, float]] = []
    escaped = comfy.sd1_clip.escape_important(text)
    strange: list[str] = []
    for part, weight in comfy.sd1_clip.token_weights(escaped, 1.0):
        known, unknown = tokenize(comfy.sd1_clip.unescape_important(part))
        found += [(token, weight) for token in known]
        strange += unknown
    if strange:
        log.warning("The demo model does not know the words: %s", ", ".join(dict.fromkeys(strange)))
    return found


class _DemoTokenizer:
    """Text to token ids with weights, in ComfyUI's shape."""

    def __init__(self, embedding_directory: Any = None, tokenizer_data: Any = None) -> None:
        pass

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **_options: Any) -> dict[str, list]:
        found = weighted_tokens(text)
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

    def encode_token_weights(self, tokens: dict[str, list]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        device = self.encoder.places.device
        (row,) = tokens["demo"]
        ids = torch.tensor([[token for token, *_ in row], [0] * len(row)], device=device)
        words, empty = self.encoder(ids)
        weights = torch.tensor([weight for _, weight, *_ in row], device=device)[:, None]
        weighted = (empty + weights * (words - empty))[None]  # as ComfyUI weights words: away from the empty prompt
        out = weighted.to(comfy.model_management.intermediate_device())
        return out, out.mean(1), {"attention_mask": torch.ones_like(out[..., 0], dtype=torch.int64)}

    def load_sd(self, sd: dict) -> Any:
        return self.load_state_dict(sd, strict=False)


class _ClipTarget:
    clip = _DemoClip
    tokenizer = _DemoTokenizer
    params: dict = {}
