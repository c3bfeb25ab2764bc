"""Attention in guided steps: by a kernel that has a backward."""

from __future__ import annotations

import functools
from typing import Any

import torch
from comfy.ldm.modules.attention import attention_pytorch, optimized_attention
from torch import Tensor

from ...errors import BackboneError
from ...features import Backbone

KERNELS_WITH_BACKWARD = ("attention_pytorch", "attention_split", "attention_basic", "attention_xformers")
SMALL = 256  # cells; for more, the sub-quadratic kernel takes longer and keeps every pair


def check_attention(backbone: Backbone) -> None:
    """Raises BackboneError for a transformer that takes ComfyUI's own choice of kernel, if that one has no backward."""
    kernel = optimized_attention.__name__
    if not backbone.names_kernel and kernel not in (*KERNELS_WITH_BACKWARD, "attention_sub_quad"):
        raise BackboneError(
            f"{backbone.name} runs with {kernel}, which has no backward, and lets no node choose another: start ComfyUI "
            "with --use-pytorch-cross-attention"
        )


def _attention_with_backward(roomy: bool, chosen: Any, q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The attention kernel in use if it has a backward, else PyTorch's.

    Sage and some flash builds have none; the sub-quadratic one has none when memory is short, and keeps every pair of cells
    when it isn't: with room it stays in use for small maps in fp32, where guided and plain pass then agree to the last bit.
    """
    name = getattr(chosen, "__name__", "")
    stays = name in KERNELS_WITH_BACKWARD or (
        roomy and name == "attention_sub_quad" and q.shape[-2] <= SMALL and q.dtype == torch.float32
    )
    return (chosen if stays else attention_pytorch)(q, *args, **kwargs)


#: By graph: what ``optimized_attention_override`` is in a guided step.
ATTENTION = {
    "full": functools.partial(_attention_with_backward, True),
    "light": functools.partial(_attention_with_backward, False),
}
