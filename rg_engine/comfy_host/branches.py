"""Runs one branch (conditional or unconditional) of a step through ComfyUI and reads it out, with or without gradient.

Everything around the network (areas, masks, hooks, ControlNets, other nodes' wrappers) is ComfyUI's own and runs without
a graph; the graph spans :meth:`BranchReader.apply_model` only.
"""

from __future__ import annotations

import contextlib
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.samplers
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from torch import Tensor

from ..errors import BackboneError
from ..features import Backbone, FeatureTap
from ..guidance import Branch, Objective, SourceStep
from .gradient_scope import Graph, gradient_scope, plain
from .saved_tensors import in_place_allowed

CONDITIONAL, UNCONDITIONAL = 0, 1
_NAMES = {CONDITIONAL: "positive", UNCONDITIONAL: "negative"}
KEY = "readout_guidance_branch"
KERNELS_WITH_BACKWARD = (
    "attention_pytorch", "attention_sub_quad", "attention_split", "attention_basic", "attention_xformers",
)  # fmt: skip


class BranchReader:
    """Reads out the model calls that it is installed on.

    With ``active`` targets it gives, for each picture, ``loss`` (B,) and ``gradient`` (B, C, H, W), the loss's gradient
    with respect to z; without, it keeps ``source`` (by branch): the readouts of targets ``recorded``, by default of those
    that need the source.
    """

    def __init__(
        self,
        backbone: Backbone,
        objective: Objective,
        x: Tensor,
        active: tuple[int, ...] = (),
        source: SourceStep | None = None,
        recorded: tuple[int, ...] | None = None,
        graph: Graph = "lean",
    ) -> None:
        self._backbone = backbone
        self._objective = objective
        self._batch = x.shape[0]
        self._active = active
        self._source = source
        self._recorded = recorded
        self._graph: Graph = graph
        self._losses: list[Tensor] = []
        self._gradients: list[Tensor] = []
        self._model: Any = None
        self.source: dict[int, SourceStep] = {}
        self.readouts: dict[int, Tensor] = {}  # of the latest call, by target
        self.whole = True  # whether the prediction of run() is the branch's own (no areas were widened for it)

    @property
    def loss(self) -> Tensor:
        return torch.stack(self._losses).mean(0)

    @property
    def gradient(self) -> Tensor:
        return torch.stack(self._gradients).mean(0)

    def install(self, options: dict[str, Any]) -> dict[str, Any]:
        """Model options that let this reader see the network's calls."""
        options = comfy.model_patcher.create_model_options_clone(options)
        add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, self.apply_model, options, is_model_options=True)
        return options

    def run(self, guider: Any, branch: int, x: Tensor, timestep: Tensor, options: dict[str, Any]) -> Tensor:
        """Run one branch by itself; returns its prediction (denoised)."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        conds = guider.conds[_NAMES[branch]]
        if all("area" in cond for cond in conds):  # regional prompts only: the readout needs the whole picture
            conds = [{key: value for key, value in cond.items() if key != "area"} for cond in conds]
            self.whole = False
        both: list[Any] = [None, None]
        both[branch] = conds
        out = comfy.samplers.calc_cond_batch(guider.inner_model, both, x, timestep, self.install(options))
        if self._active and not self._gradients:
            raise BackboneError(
                "no prompt covers the whole picture at this step, so there is nothing to read out: add one without an area"
            )
        return out[branch]

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
                    self.source.setdefault(branch, self._objective.source_step(read, self._recorded))
            return denoised
        network = self._model.diffusion_model
        with (
            gradient_scope(network, self._graph),
            _in_place_allowed(control, options),
            FeatureTap(network, self._backbone) as tap,
        ):
            leaf = x.detach().clone().requires_grad_()
            denoised = executor(
                leaf,
                plain(t),
                plain(c_concat),
                plain(c_crossattn),
                plain(control),
                {**options, "optimized_attention_override": _attention_with_backward},
                **plain(kwargs),
            )
            features, emb = tap.take()
            z = (leaf * scale.clone()).detach()
            for n in range(len(branches)):
                rows = slice(n * self._batch, (n + 1) * self._batch)
                read = Branch(
                    features=[f[rows].detach().float().requires_grad_() for f in features],
                    emb=plain(emb)[rows], z=z[rows], noise_level=plain(noise_level)[rows],
                )  # fmt: skip
                self._backward(leaf, features, read, rows, scale.clone(), last=n + 1 == len(branches))
        return denoised.detach()

    def _backward(self, leaf: Tensor, features: list[Tensor], read: Branch, rows: slice, scale: Tensor, last: bool) -> None:
        """The gradient in two parts: through the heads, in fp32, then through the network.

        In between it is scaled by a power of two to a largest element of 1..2, so that half precision neither underflows nor
        overflows.
        """
        loss, readouts = self._objective.loss(read, self._active, self._source)
        self.readouts = {i: readout.detach() for i, readout in readouts.items()}
        at_taps = torch.autograd.grad(loss.sum(), read.features, allow_unused=True)
        pairs = [(f, g) for f, g in zip(features, at_taps, strict=True) if g is not None]
        largest = torch.stack([g.abs().amax() for _, g in pairs]).amax()
        gain = torch.where(torch.isfinite(largest) & (largest > 0), torch.exp2(-largest.log2().floor()), 1.0)
        outputs = [f[rows] for f, _ in pairs]
        (gradient,) = torch.autograd.grad(outputs, leaf, [(g * gain).to(f.dtype) for f, g in pairs], retain_graph=not last)
        self._losses.append(loss.detach())
        self._gradients.append(gradient[rows].float() / gain / scale[rows])


def _in_place_allowed(control: Any, options: dict[str, Any]) -> contextlib.AbstractContextManager[Any]:
    """ControlNets' outputs are added in place, and other nodes' patches may write in place, to what backward needs.

    Such tensors are copied before they change; that slows every operation a little, so it is on only then.
    """
    if control is not None or options.get("patches") or options.get("patches_replace"):
        return in_place_allowed()
    return contextlib.nullcontext()


def input_scale(model: Any, sigma: Tensor, x: Tensor) -> Tensor:
    """z / x at this noise level, (B, 1, 1, 1): what the network's input is multiplied by."""
    ones = torch.ones_like(x[:, :1, :1, :1])
    return model.model_sampling.calculate_input(sigma.expand(x.shape[0]), ones)


def _attention_with_backward(chosen: Any, *args: Any, **kwargs: Any) -> Tensor:
    """The attention kernel in use if it has a backward, else PyTorch's (sage and some flash builds have none)."""
    import os

    kernel = (
        chosen
        if getattr(chosen, "__name__", "") in KERNELS_WITH_BACKWARD and not os.environ.get("SDPA")
        else attention_pytorch
    )
    return kernel(*args, **kwargs)
