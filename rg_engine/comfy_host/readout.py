"""Reads a latent out: the picture's pose, depth, edges or features, without sampling."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from torch import Tensor

from ..features import FeatureTap
from ..guidance.pictures import readout_picture
from ..heads import ReadoutHead
from .guided_model import backbone_of, check_fits


def read_out(
    model: Any, head: ReadoutHead, latent: dict[str, Any], noise_percent: float, positive: Any, seed: int
) -> tuple[Tensor, Tensor]:
    """The readout (B, D, h, w) of a latent noised to ``noise_percent`` of the diffusion time (0 is clean), and its picture.

    Without ``positive`` the prompt is empty: zeros of the width that the model expects.
    """
    backbone = backbone_of(model)
    check_fits(head, backbone)
    samples = comfy.sample.fix_empty_latent_channels(model, latent["samples"])
    noise = comfy.sample.prepare_noise(samples, seed, latent.get("batch_index"))
    model_sampling = model.get_model_object("model_sampling")
    sigma = float(model_sampling.percent_to_sigma(1.0 - noise_percent))
    sigma = min(max(sigma, float(model_sampling.sigma_min)), float(model_sampling.sigma_max))
    reader = _ReadOnce(head, backbone)
    guider = comfy.samplers.CFGGuider(model.clone())
    guider.inner_set_conds({"positive": positive if positive is not None else _empty_prompt(model)})
    guider.set_cfg(1.0)
    add_wrapper_with_key(
        WrappersMP.APPLY_MODEL, "readout_guidance_read", reader.apply_model, guider.model_options, is_model_options=True
    )
    guider.sample(noise, samples, reader, torch.tensor([sigma, 0.0]), disable_pbar=True, seed=seed)
    assert reader.readout is not None
    readout = reader.readout.to(comfy.model_management.intermediate_device())
    height, width = samples.shape[-2:]
    return readout, readout_picture(readout, head.spec, (8 * height, 8 * width))


class _ReadOnce(comfy.samplers.Sampler):
    """A 'sampler' that noises the latent, runs the model once and keeps the readout."""

    def __init__(self, head: ReadoutHead, backbone: Any) -> None:
        self._head = head
        self._backbone = backbone
        self.readout: Tensor | None = None

    def sample(
        self, model_wrap: Any, sigmas: Tensor, extra_args: dict, callback: Any, noise: Tensor,
        latent_image: Tensor | None = None, denoise_mask: Tensor | None = None, disable_pbar: bool = False,
    ) -> Tensor:  # fmt: skip
        x = model_wrap.inner_model.model_sampling.noise_scaling(sigmas[0], noise, latent_image, False)
        model_wrap(x, sigmas[0] * x.new_ones([x.shape[0]]), **extra_args)
        return x

    def apply_model(self, executor: Any, x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        network, home = executor.class_obj.diffusion_model, next(self._head.network.parameters()).device
        with FeatureTap(network, self._backbone) as tap:
            out = executor(x, t, *args, **kwargs)
            features, emb = tap.take()
        try:
            with torch.inference_mode(False):
                self._head.network.to(x.device)
            with torch.no_grad():
                self.readout = self._head.read(features, emb, (x.shape[-2], x.shape[-1]))
        finally:
            with torch.inference_mode(False):
                self._head.network.to(home)
        return out


def _empty_prompt(model: Any) -> list:
    config = model.model.model_config.unet_config
    context = torch.zeros(1, 77, int(config.get("context_dim") or 768))
    return [[context, {"pooled_output": torch.zeros(1, 1280)}]]
