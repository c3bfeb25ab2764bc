"""Finished latents to pictures, differentiable: the VAE's decoder, one picture at a time, run again in backward."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import comfy.model_management
import torch
from torch import Tensor

from ....errors import OptimizationError
from ...loaded.gradient_scope import GradientScope, Graph
from ...loaded.saved_tensors import beside_other_nodes
from ..rerun import Stage

log = logging.getLogger("readout_guidance")
#: What decoding with a graph takes, as a multiple of what ComfyUI asks for to decode (counted for SD's decoder: 5.6 GiB
#: at 512 px in fp32, 3.5 with the light graph).
MEMORY: dict[Graph, float] = {"full": 4.0, "light": 2.5}


class Decoder:
    """A VAE's decoder. Raises OptimizationError for one whose pictures can't be differentiated."""

    def __init__(self, vae: Any) -> None:
        vae.throw_exception_if_invalid()
        self._vae = vae
        grey = vae.process_output(torch.zeros(1, 1, 1, 3))  # ComfyUI's pictures are in 0..1
        self._signed = abs(float(grey.mean()) - 0.5) < 1e-3  # whether the decoder's are in -1..1
        self._graph: Graph = "full"
        self._scope = GradientScope(vae.first_stage_model, self._graph)

    def __call__(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) or (B, C, 1, h, w) in its scale to pictures (B, 3, H, W) in -1..1, not clamped, fp32."""
        stage = Stage(self._decode, self._scoped, ready=lambda: self._load(latents[:1].shape), lighten=self._lighten)
        return torch.cat([stage(row) for row in latents.split(1)])

    def _decode(self, latent: Tensor) -> Tensor:
        vae = self._vae
        frames = getattr(vae, "latent_dim", 2) == 3  # of a model that makes videos too
        latent = latent if latent.ndim == 4 + frames else latent.unsqueeze(2) if frames else latent.squeeze(2)
        images = vae.first_stage_model.decode(latent.to(vae.vae_dtype).to(vae.device)).float()
        images = images[:, :, 0] if images.ndim == 5 and images.shape[2] == 1 else images
        if images.ndim != 4 or images.shape[1] != 3:
            raise OptimizationError(
                f"the vae makes {tuple(images.shape[1:])} of a latent, and losses are of pictures (3, height, width): "
                "video, audio and 3D are not optimized"
            )
        return (images if self._signed else 2 * images - 1).to(latent.device)

    @contextlib.contextmanager
    def _scoped(self) -> Iterator[None]:
        with self._scope, beside_other_nodes():
            yield

    def _load(self, shape: Any) -> None:
        vae = self._vae
        if torch.device(vae.device).type != "cpu":
            needed = MEMORY[self._graph] * vae.memory_used_decode(tuple(shape), vae.vae_dtype)
            comfy.model_management.load_models_gpu([vae.patcher], memory_required=needed)

    def _lighten(self) -> bool:
        if self._graph == "light":
            return False
        log.warning("Out of memory while decoding: the light graph is used from now on.")
        self._graph = "light"
        self._scope = GradientScope(self._vae.first_stage_model, self._graph)
        comfy.model_management.soft_empty_cache()
        return True
