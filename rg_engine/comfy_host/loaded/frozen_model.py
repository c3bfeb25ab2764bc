"""A loaded model that is read and never changed: for reading latents out, and for training heads.

The work is done inside a sampling run of ComfyUI's own, so that prompts, LoRAs, offloading and memory are ComfyUI's.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import comfy.model_management
import comfy.model_patcher
import comfy.samplers
import torch
from comfy.ldm.modules.diffusionmodules.util import timestep_embedding
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from torch import Tensor

from ...errors import TargetError
from ...features import Backbone, FeatureTap
from ...features.tap import Enough
from ...guidance.pictures import spread
from ...training import Reading
from .frozen_layers import plain
from .model import backbone_of, input_scale, pictures_have_frames

KEY = "readout_guidance_read"
Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Noised:
    """What the network was called on: clean pictures as it knows them, x and sigma (n,)."""

    clean: Tensor
    x: Tensor
    sigma: Tensor


def with_frozen_model(
    model: Any, positive: Any, shape: tuple[int, ...], work: Callable[[FrozenModel], Result],
    backbone: Backbone | None = None, *, tapped: bool = True, more: Mapping[str, Any] | None = None,
) -> Result:  # fmt: skip
    """Load ``model`` (a ModelPatcher) as for sampling latents of ``shape`` (B, C, h, w), and give ``work``'s result.

    positive: a CONDITIONING, None for an empty prompt; one with as many rows as there are pictures has one for each. more:
    further ones by name. backbone: tapped where it is read, if not at its own taps; tapped: whether it is at all. Raises
    TargetError for a combined or a regional prompt: features have to be the whole picture's.
    """
    backbone = (backbone or backbone_of(model)) if tapped else None
    prompts = {"positive": positive, **(more or {})}
    for prompt in filter(None, prompts.values()):
        limits = [
            key
            for _, facts in prompt
            for key in ("area", "mask", "start_percent", "end_percent")
            if facts.get(key) is not None
        ]
        if len(prompt) != 1 or limits:
            found = f"limited by its {limits[0]}" if limits else f"made of {len(prompt)} prompts"
            raise TargetError(
                f"the prompt is {found}: to read a picture out, give one that counts for all of it (CLIP Text Encode)"
            )
    guider = comfy.samplers.CFGGuider(model.clone())
    guider.inner_set_conds({key: prompt if prompt is not None else empty_prompt(model) for key, prompt in prompts.items()})
    guider.set_cfg(1.0)
    frames = pictures_have_frames(model)
    run = _Work(lambda loaded, options: work(FrozenModel(loaded, options, backbone, frames)))
    with torch.inference_mode():  # as nodes run: weights that are moved otherwise could be used neither here nor there
        nothing = torch.zeros((*shape[:2], 1, *shape[2:]) if frames else shape)
        guider.sample(nothing, nothing, run, torch.tensor([1.0, 0.0]), disable_pbar=True, seed=0)
    return run.result


class FrozenModel:
    """The model while it is loaded."""

    def __init__(self, guider: Any, options: dict[str, Any], backbone: Backbone | None, frames: bool = False) -> None:
        self._guider, self._frames = guider, frames
        self._options = options
        self._backbone = backbone

    @property
    def device(self) -> torch.device:
        return comfy.model_management.get_torch_device()

    def read(
        self,
        latents: Tensor,
        noise: Tensor,
        time: Tensor,
        *,
        pictures: Tensor | None = None,
        reversed_timestep: bool = False,
    ) -> Reading:
        """Features of noised pictures, as ordinary tensors.

        Args: latents (n, C, h, w) as the VAE gives them; noise like latents; time (n,), parts of the diffusion time;
        pictures (n,), each one's row among the prompts; reversed_timestep gives the embedding of 999 - t instead of t's.
        """
        assert self._backbone is not None
        catch = _Catch(self._backbone)
        with torch.inference_mode():
            noised = self.call(latents, noise, time, catch.apply_model, pictures=pictures)
            model, sigma = self._guider.inner_model, noised.sigma
            sampling = model.model_sampling
            features, emb = catch.found
            level = (sigma * input_scale(model, sigma, noised.x).flatten()).flatten()
            emb = self._backbone.emb(emb, level)
            if reversed_timestep:
                network = model.diffusion_model
                turned = timestep_embedding(999 - sampling.timestep(sigma), network.model_channels).to(emb.dtype)
                emb = network.time_embed(turned)
        with torch.inference_mode(False):
            return Reading(features=[plain(f).float() for f in features], emb=plain(emb).float(), noise_level=plain(level))

    @property
    def network(self) -> Any:
        return self._guider.inner_model.diffusion_model

    @property
    def model_sampling(self) -> Any:
        return self._guider.inner_model.model_sampling

    def call(
        self, latents: Tensor, noise: Tensor, time: Tensor, through: Callable[..., Tensor], *, prompt: str = "positive",
        pictures: Tensor | None = None, attention: Any = None,
    ) -> Noised:  # fmt: skip
        """Call the network on noised pictures (arguments as :meth:`read`'s); ``through`` gets ComfyUI's executor of the call
        and its arguments, and returns what it predicts. prompt: whose. attention: in the kernel's place, unless another node
        took it."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        model = self._guider.inner_model
        sampling = model.model_sampling
        clip = (float(sampling.sigma_min), float(sampling.sigma_max))
        sigmas = [min(max(float(sampling.percent_to_sigma(1.0 - float(t))), clip[0]), clip[1]) for t in time]
        sigma = torch.tensor(sigmas, device=self.device)
        if self._frames:
            latents, noise = latents[:, :, None], noise[:, :, None]
        clean = model.process_latent_in(latents.to(self.device))
        x = sampling.noise_scaling(spread(sigma, clean), noise.to(clean), clean, False)
        options = comfy.model_patcher.create_model_options_clone(self._options)
        add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, through, options, is_model_options=True)
        if attention is not None:
            options["transformer_options"].setdefault("optimized_attention_override", attention)
        comfy.samplers.calc_cond_batch(model, [_prompts_of(self._guider.conds[prompt], pictures)], x, sigma, options)
        return Noised(clean=clean, x=x, sigma=sigma)

    def sample(self, noise: Tensor, steps: int, cfg: float, prompt: str = "positive") -> Tensor:
        """Pictures made from noise (n, C, h, w) by Euler's method, as latents of the VAE; there has to be a prompt named
        negative."""
        model, guider = self._guider.inner_model, self._guider
        sigmas = comfy.samplers.calculate_sigmas(model.model_sampling, "normal", steps).to(self.device)
        before, guider.conds = guider.conds, {**guider.conds, "positive": guider.conds[prompt]}
        guider.set_cfg(cfg)
        try:
            extra = {"model_options": self._options, "seed": 0}
            x = noise.to(self.device)
            made = comfy.samplers.ksampler("euler").sample(guider, sigmas, extra, None, x, torch.zeros_like(x), None, True)
            return model.process_latent_out(made.float()).cpu()
        finally:
            guider.conds = before
            guider.set_cfg(1.0)


class _Work(comfy.samplers.Sampler):
    """A 'sampler' that does something else with the loaded model."""

    result: Any = None

    def __init__(self, work: Callable[[Any, dict[str, Any]], Any]) -> None:
        self._work = work

    def sample(self, model_wrap: Any, sigmas: Tensor, extra_args: dict, callback: Any, noise: Tensor, *_: Any) -> Tensor:
        self.result = self._work(model_wrap, extra_args["model_options"])
        return noise


class _Catch:
    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone
        self.found: tuple[list[Tensor], Tensor | None] = ([], None)

    def apply_model(self, executor: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with FeatureTap(executor.class_obj.diffusion_model, self._backbone, end=True) as tap:
            with contextlib.suppress(Enough):
                executor(x, *args, **kwargs)
            self.found = tap.take()
        return torch.zeros_like(x)


def _prompts_of(conds: list[dict[str, Any]], pictures: Tensor | None) -> list[dict[str, Any]]:
    """The rows of ``pictures`` in conditionings that have one a picture."""
    if pictures is None:
        return conds
    picked = []
    for cond in conds:
        rows = {
            key: value._copy_with(value.cond[pictures.to(value.cond.device)])
            for key, value in cond["model_conds"].items()
            if isinstance(getattr(value, "cond", None), Tensor) and value.cond.shape[0] > 1
        }
        picked.append({**cond, "model_conds": {**cond["model_conds"], **rows}})
    return picked


def empty_prompt(model: Any) -> list:
    """A CONDITIONING of zeros, of the width that a UNet expects. Raises TargetError for a transformer, to which zeros are
    nothing that it has seen."""
    if backbone_of(model).is_transformer:
        raise TargetError("a transformer needs a prompt: connect positive (an empty CLIP Text Encode is one)")
    config = model.model.model_config.unet_config
    return [[torch.zeros(1, 77, int(config.get("context_dim") or 768)), {"pooled_output": torch.zeros(1, 1280)}]]
