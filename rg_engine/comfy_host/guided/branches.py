"""Runs one branch (conditional or unconditional) of a step through ComfyUI and reads it out, with or without gradient.

Everything around the network (areas, masks, hooks, ControlNets, other nodes' wrappers) is ComfyUI's own and runs without
a graph; the graph spans :meth:`BranchReader.apply_model` only.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.samplers
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from torch import Tensor

from ...errors import BackboneError
from ...features import Backbone, FeatureTap
from ...guidance import Branch, Objective, SourceStep
from ..loaded.frozen_layers import plain
from ..loaded.gradient_scope import GradientScope
from ..loaded.model import input_scale
from ..loaded.saved_tensors import beside_other_nodes

CONDITIONAL, UNCONDITIONAL = 0, 1
_NAMES = {CONDITIONAL: "positive", UNCONDITIONAL: "negative"}
KEY = "readout_guidance_branch"
KERNELS_WITH_BACKWARD = ("attention_pytorch", "attention_split", "attention_basic", "attention_xformers")
SMALL = 256  # cells; for more, the sub-quadratic kernel takes longer and keeps every pair


class BranchReader:
    """Reads out the model calls that it is installed on.

    With ``active`` targets it gives, for each picture, the loss (B,) of each branch and ``gradient`` (B, C, H, W), that of
    the sum of the branches' losses with respect to z; ``sources`` are what they are compared with, by branch. Without, it
    keeps ``found`` (by branch): the readouts of targets ``recorded``, by default of those that need the source.
    """

    def __init__(
        self,
        backbone: Backbone,
        objective: Objective,
        x: Tensor,
        active: tuple[int, ...] = (),
        sources: dict[int, SourceStep] | None = None,
        recorded: tuple[int, ...] | None = None,
        scope: GradientScope | None = None,
    ) -> None:
        self._backbone = backbone
        self._objective = objective
        self._batch = x.shape[0]
        self._active = active
        self._sources = sources or {}
        self._recorded = recorded
        self._scope = scope
        self._losses: dict[int, list[Tensor]] = {}
        self._gradients: dict[int, list[Tensor]] = {}
        self._model: Any = None
        self.found: dict[int, SourceStep] = {}
        self.readouts: dict[int, Tensor] = {}  # of the latest call, by target
        self.whole = True  # whether the predictions of run() are the branches' own (no areas were widened for them)

    def loss(self, branch: int = CONDITIONAL) -> Tensor:
        return torch.stack(self._losses[branch]).mean(0)

    @property
    def gradient(self) -> Tensor:
        return torch.stack([torch.stack(parts).mean(0) for parts in self._gradients.values()]).sum(0)

    def install(self, options: dict[str, Any]) -> dict[str, Any]:
        """Model options that let this reader see the network's calls."""
        options = comfy.model_patcher.create_model_options_clone(options)
        add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, self.apply_model, options, is_model_options=True)
        return options

    def run(
        self, guider: Any, branches: Sequence[int], x: Tensor, timestep: Tensor, options: dict[str, Any]
    ) -> dict[int, Tensor]:
        """Run some branches by themselves; returns their predictions (denoised)."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        conds: list[Any] = [None, None]
        for branch in branches:
            given = guider.conds[_NAMES[branch]]
            if all("area" in cond for cond in given):  # regional prompts only: the readout needs the whole picture
                given = [{key: value for key, value in cond.items() if key != "area"} for cond in given]
                self.whole = False
            conds[branch] = given
        out = comfy.samplers.calc_cond_batch(guider.inner_model, conds, x, timestep, self.install(options))
        if self._active and any(branch not in self._gradients for branch in branches):
            raise BackboneError(
                "no prompt covers the whole picture at this step, so there is nothing to read out: add one without an area"
            )
        return {branch: out[branch] for branch in branches}

    def apply_model(
        self,
        executor: Any,
        x: Tensor,
        t: Tensor,
        c_concat: Any = None,
        c_crossattn: Any = None,
        control: Any = None,
        transformer_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The wrapper around BaseModel.apply_model: x (n * B, C, H, W), n prompts one after another."""
        options = transformer_options or {}
        if tuple(x.shape[-2:]) != self._objective.size:
            return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
        self._model = executor.class_obj
        scale = input_scale(self._model, t, x)
        noise_level = t.expand(x.shape[0]) * scale.view(-1)
        branches = options.get("cond_or_uncond", [CONDITIONAL])
        if not self._active:
            with FeatureTap(self._model.diffusion_model, self._backbone) as tap:
                denoised = executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
                features, emb = tap.take()
            with torch.inference_mode(False), torch.no_grad():
                z = x * scale
                for n, branch in enumerate(branches):
                    rows = slice(n * self._batch, (n + 1) * self._batch)
                    read = Branch(
                        features=[f[rows] for f in features], emb=emb[rows], z=z[rows], noise_level=noise_level[rows]
                    )
                    self.found.setdefault(branch, self._objective.source_step(read, self._recorded))
            return denoised
        network = self._model.diffusion_model
        scope = self._scope if self._scope is not None and self._scope.network is network else GradientScope(network)
        with scope, _beside_others(control, options, scope), FeatureTap(network, self._backbone) as tap:
            leaf = x.detach().clone().requires_grad_()
            denoised = executor(
                leaf,
                plain(t),
                plain(c_concat),
                plain(c_crossattn),
                plain(control),
                {**options, "optimized_attention_override": ATTENTION[scope.graph]},
                **plain(kwargs),
            )
            features, emb = tap.take()
            whole = Branch(
                features=features, emb=plain(emb), z=(leaf * scale.clone()).detach(), noise_level=plain(noise_level)
            )
            self._backward(leaf, whole, branches, scale.clone(), light=scope.graph == "light")
        return denoised.detach()

    def _backward(self, leaf: Tensor, read: Branch, branches: Sequence[int], scale: Tensor, light: bool) -> None:
        """The gradient in two parts: through the heads in fp32, one branch and head at a time, then through the network.

        In between it is scaled by a power of two to a largest element of 1..2, so that half precision neither underflows nor
        overflows.
        """
        at_taps: list[list[Tensor]] = []
        gains = []
        assert read.noise_level is not None
        for n, branch in enumerate(branches):
            rows = slice(n * self._batch, (n + 1) * self._batch)
            features = [f[rows].detach().float().requires_grad_() for f in read.features]
            part = Branch(features=features, emb=read.emb[rows], z=read.z[rows], noise_level=read.noise_level[rows])
            found: list[Tensor] = []
            total = features[0].new_zeros(self._batch)
            for targets in self._objective.by_head(self._active):
                loss, readouts = self._objective.loss(part, targets, self._sources.get(branch), light=light)
                total += loss.detach()
                self.readouts |= {i: readout.detach() for i, readout in readouts.items()}
                gradients = torch.autograd.grad(loss.sum(), features, allow_unused=True, materialize_grads=True)
                found = [a + b for a, b in zip(found, gradients, strict=True)] if found else list(gradients)
            self._losses.setdefault(branch, []).append(total)
            largest = torch.stack([g.abs().amax() for g in found]).amax()
            gain = torch.where(torch.isfinite(largest) & (largest > 0), torch.exp2(-largest.log2().floor()), 1.0)
            at_taps.append([g * gain for g in found])
            gains.append(gain)
        outputs = [torch.cat(parts).to(f.dtype) for f, parts in zip(read.features, zip(*at_taps, strict=True), strict=True)]
        (gradient,) = torch.autograd.grad(read.features, leaf, outputs)
        for n, (branch, gain) in enumerate(zip(branches, gains, strict=True)):
            rows = slice(n * self._batch, (n + 1) * self._batch)
            self._gradients.setdefault(branch, []).append(gradient[rows].float() / gain / scale[rows])


def _beside_others(control: Any, options: dict[str, Any], scope: GradientScope) -> contextlib.AbstractContextManager[Any]:
    """ControlNets' outputs are added in place, and other nodes' patches and layers do what inference allows.

    Making room for that slows every operation a little, so it is on only then.
    """
    if scope.shared or control is not None or options.get("patches") or options.get("patches_replace"):
        return beside_other_nodes()
    return contextlib.nullcontext()


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
