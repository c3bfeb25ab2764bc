"""Readout targets on the finished picture: its latent is noised a little, read by the heads, and compared as in guidance."""

from __future__ import annotations

import dataclasses
from typing import Any

import comfy.model_patcher
import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from torch import Tensor

from ....features import Backbone, FeatureTap
from ....guidance import Branch, Objective, SourceStep, Target
from ....guidance.pictures import spread
from ....guidance.targets import fit
from ...loaded.frozen_layers import plain
from ...loaded.model import heads_on, input_scale
from ..network import Network
from ..rerun import Stage, gain_of

KEY = "readout_guidance_finished"
#: The part of the diffusion time at which a finished latent is read; heads read best at a little noise.
NOISE_PERCENT = 0.1
#: What limits a prompt, which the whole picture is read with.
LIMITS = ("area", "mask", "timestep_start", "timestep_end")


class FinishedReadout:
    """The loss of a chain of targets, of finished latents (B, C, h, w), or (B, C, 1, h, w), in the model's scale, (B,).

    Drags, and appearance without a reference, start from the first picture that it is asked about. Losses that are measured
    in the extent of z take that picture's throughout, so that this is a function of the latents with the gradient it says.
    """

    def __init__(
        self, network: Network, options: dict[str, Any], targets: tuple[Target, ...], backbone: Backbone, noise: Tensor
    ) -> None:
        self._network, self._options, self._backbone, self._noise = network, options, backbone, noise
        self._objective = Objective(
            targets, (noise.shape[-2], noise.shape[-1]), len(noise), noise.device, taps=backbone.taps
        )
        self._heads = [target.head for target in targets]
        self._source: SourceStep | None = None
        self._z: Tensor | None = None  # the first picture's, noised
        sampling = network.inner_model.model_sampling
        sigma = float(sampling.percent_to_sigma(1.0 - NOISE_PERCENT))
        self._sigma = torch.full((len(noise),), sigma, device=noise.device)
        self._active = tuple(range(len(targets)))

    def __call__(self, latents: Tensor) -> Tensor:
        if self._source is None:
            self._source = self._look_at_source(latents.detach())
        network = self._network
        stage = Stage(self._loss, network.scope, backward=self._backward, ready=network.load, lighten=network.lighten)
        return stage(latents)

    def _loss(self, latents: Tensor) -> Tensor:
        with heads_on(self._heads, latents.device):
            return self._objective.loss(self._branch(latents), self._active, self._source)[0]

    def _backward(self, latents: Tensor, gradient: Tensor) -> Tensor:
        """In two parts, through the heads in fp32 and through the network, with a gain of its own: each feature's share of
        the loss is too small for half precision."""
        with heads_on(self._heads, latents.device):
            branch = self._branch(latents)
            features = [f.detach().float().requires_grad_() for f in branch.features]
            loss, _ = self._objective.loss(dataclasses.replace(branch, features=features), self._active, self._source)
            shares = torch.autograd.grad(loss, features, gradient.to(loss), allow_unused=True, materialize_grads=True)
        gain = gain_of(shares) or 1.0
        scaled = [(gain * share).to(f.dtype) for share, f in zip(shares, branch.features, strict=True)]
        return torch.autograd.grad(branch.features, latents, scaled)[0] / gain

    def _look_at_source(self, latents: Tensor) -> SourceStep:
        """What the picture now, and references, read like."""
        objective, network = self._objective, self._network
        network.load()
        with torch.inference_mode(), heads_on(self._heads, latents.device):
            branch = self._branch(latents)
            self._z = branch.z
            first = objective.source_step(branch)
            readouts = dict(first.readouts)
            for i, target in enumerate(objective.targets):
                if target.needs_reference and target.reference_latent is not None:
                    reference = spread(fit(target.reference_latent.to(latents), objective.size), latents)
                    branch = self._branch(network.inner_model.process_latent_in(reference).expand_as(latents))
                    readouts |= objective.source_step(branch, [i]).readouts
        with torch.inference_mode(False):
            return SourceStep(readouts=plain(readouts), z_min=plain(first.z_min), z_max=plain(first.z_max))

    def _branch(self, latents: Tensor) -> Branch:
        """The noised latents under the positive prompt, read."""
        model, found = self._network.inner_model, []

        def read(executor: Any, *args: Any, **kwargs: Any) -> Tensor:
            with FeatureTap(model.diffusion_model, self._backbone) as tap:
                out = executor(*args, **kwargs)
                found.append(tap.take())
            return out

        x = model.model_sampling.noise_scaling(spread(self._sigma, latents), self._noise, latents, False)
        options = comfy.model_patcher.create_model_options_clone(self._options)
        if torch.is_grad_enabled():
            options = self._network.with_graph(options)
        add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, read, options, is_model_options=True)
        prompt = {key: value for key, value in self._network.conds["positive"][0].items() if key not in LIMITS}
        comfy.samplers.calc_cond_batch(model, [[prompt]], x, self._sigma, options)
        features, emb = found[0]
        scale = input_scale(model, self._sigma, x)
        z = self._z if self._z is not None else x.detach() * scale
        level = self._sigma * scale.view(-1)
        return Branch(features=features, emb=self._backbone.emb(emb, level), z=z, noise_level=level, percent=1.0)
