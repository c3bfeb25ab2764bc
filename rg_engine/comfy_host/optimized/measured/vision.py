"""CLIP's picture and text features through ComfyUI's own CLIP_VISION and CLIP, the first of them differentiable."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import comfy.model_management
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ....errors import OptimizationError
from ....optimization.pixels import normalised
from ...loaded.frozen_layers import plain
from ...loaded.gradient_scope import GradientScope
from ...loaded.saved_tensors import beside_other_nodes
from ..rerun import Stage

#: A projection with shorter columns, or larger elements, is memory that nobody filled.
SMALLEST, LARGEST = 1e-6, 100.0


class PictureEncoder:
    """A CLIP_VISION as a function of pixels (n, 3, size, size) in 0..1, to projected features (n, D).

    Not ``encode_image``: it rounds to 1/255, where every gradient ends. Raises OptimizationError for a model without a
    projection, whose features share no space with texts.
    """

    def __init__(self, clip_vision: Any) -> None:
        projection: Any = getattr(clip_vision.model, "visual_projection", None)
        if not hasattr(projection, "weight"):
            raise OptimizationError(
                f"this CLIP Vision model ({type(clip_vision.model).__name__}) has no projection into CLIP's space (DINO, "
                "SigLIP and LLaVA towers have none): load a CLIP ViT-L, ViT-H or ViT-bigG with Load CLIP Vision"
            )
        self._vision = clip_vision
        self._scope = GradientScope(clip_vision.model)
        self.size_px = int(clip_vision.image_size)
        self.width = int(projection.weight.shape[0])

    def __call__(self, pixels: Tensor) -> Tensor:
        return Stage(self._embed, self._scoped, ready=self._load)(pixels)

    def of_pictures(self, pictures: Tensor) -> Tensor:
        """Features of IMAGEs (n, H, W, 3), (n, D)."""
        pixels = pictures[..., :3].movedim(-1, 1).float().clone()
        return self(F.interpolate(pixels, (self.size_px, self.size_px), mode="bilinear", antialias=True))

    def _embed(self, pixels: Tensor) -> Tensor:
        vision = self._vision
        values = normalised(pixels.to(vision.load_device), tuple(vision.image_mean), tuple(vision.image_std)).float()
        return vision.model(pixel_values=values, intermediate_output=-2)[2].float().to(pixels.device)

    def _load(self) -> None:
        comfy.model_management.load_model_gpu(self._vision.patcher)

    @contextlib.contextmanager
    def _scoped(self) -> Iterator[None]:
        with self._scope, beside_other_nodes():  # its layers add in place
            yield


def text_feature(clip: Any, text: str, width: int) -> Tensor:
    """The projected feature (D,) of a text, of the encoder in ``clip`` that shares the picture encoder's space.

    Raises OptimizationError for an empty text, and for a CLIP without a projection of that width.
    """
    if not text.strip():
        raise OptimizationError("the text is empty: write what the picture should be like, or connect image instead")
    found: dict[str, tuple[Any, Any]] = {}
    for name, encoder in clip.cond_stage_model.named_children():
        projection = getattr(getattr(encoder, "transformer", None), "text_projection", None)
        if isinstance(projection, nn.Module):
            found[name] = (encoder, projection)
    fitting = [name for name, (_, projection) in found.items() if projection.weight.shape[0] == width]
    if not fitting:
        widths = ", ".join(f"{name}: {projection.weight.shape[0]}" for name, (_, projection) in found.items())
        raise OptimizationError(
            f"the CLIP Vision model gives {width} features and this CLIP {widths or 'has no projection into that space'}: "
            "take both of the same pair (CLIP-L with ViT-L/14, OpenCLIP-H with ViT-H/14, SDXL's CLIP-G with ViT-bigG)"
        )
    encoder, projection = found[fitting[0]]
    _check_projection(projection)
    tokens = clip.tokenize(text)[fitting[0].removeprefix("clip_")]
    comfy.model_management.load_model_gpu(clip.patcher)
    try:
        encoder.set_clip_options({"layer": None, "projected_pooled": True})
        _, pooled = encoder.encode_token_weights(tokens)[:2]
    finally:
        encoder.reset_clip_options()
    with torch.inference_mode(False):
        return plain(pooled[0].float().cpu())


def _check_projection(projection: Any) -> None:
    """ComfyUI leaves the projection of a file that has none as the memory was, or as the identity."""
    weight = projection.weight.float()
    eye = weight.shape[0] == weight.shape[1] and torch.equal(weight, torch.eye(len(weight), device=weight.device))
    filled = bool(weight.abs().amax() < LARGEST) and bool(weight.norm(dim=0).amin() > SMALLEST)  # NaN is neither
    if eye or not filled:
        raise OptimizationError(
            "this CLIP's file holds no text_projection, so that its texts share no space with pictures: load a whole CLIP "
            "(both towers in one file, which Load CLIP and Load CLIP Vision both read)"
        )
