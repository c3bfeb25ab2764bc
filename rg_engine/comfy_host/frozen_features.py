"""Features of a frozen ComfyUI model for training heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..features import FeatureTap
from .guided_model import backbone_of


class FrozenFeatures:
    """Noises clean latents and gives the features of a model that is loaded and never changes."""

    def __init__(self, model: Any) -> None:
        import comfy.model_management

        comfy.model_management.load_models_gpu([model])
        self.backbone = backbone_of(model)
        self._model = model.model
        self.device = model.load_device

    def __call__(self, x0: Tensor, context: Tensor, timestep: Tensor, noise: Tensor) -> tuple[list[Tensor], Tensor]:
        """Features and emb, as ordinary tensors without a graph.

        Args: x0 (B, C, h, w), clean latents in the model's own scale; context (B, tokens, width); timestep (B,) in 0..999;
        noise like x0.
        """
        sampling = self._model.model_sampling
        with torch.no_grad(), FeatureTap(self._model.diffusion_model, self.backbone) as tap:
            sigma = sampling.sigma(timestep.float()).to(x0)
            wide = sigma.view(-1, 1, 1, 1)
            self._model.apply_model(x0 + wide * noise, sigma, c_crossattn=context)
            features, emb = tap.take()
        return [f.float() for f in features], emb.float()
