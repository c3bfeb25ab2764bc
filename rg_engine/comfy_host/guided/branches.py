"""Runs one branch (conditional or unconditional) of a step through ComfyUI and reads it out, with or without gradient.

Everything around the network (areas, masks, hooks, ControlNets, other nodes' wrappers) is ComfyUI's own and runs without
a graph; the graph spans :meth:`BranchReader.apply_model` only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import comfy.model_management
import comfy.model_patcher
import torch
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from torch import Tensor

from ...features import Backbone, FeatureTap
from ...features.tap import Enough
from ...guidance import Branch, Objective, Part, SourceStep, parts_of
from ...guidance.feature_target import feature_gap
from ...guidance.objective import whole_step
from ...guidance.parts import stitched, together
from ..loaded.frozen_layers import plain
from ..loaded.gradient_scope import GradientScope
from ..loaded.model import input_scale
from ..loaded.saved_tensors import beside_other_nodes
from .attention import ATTENTION

CONDITIONAL, UNCONDITIONAL = 0, 1
PROMPTS = {CONDITIONAL: "positive", UNCONDITIONAL: "negative"}
KEY = "readout_guidance_branch"


class BranchReader:
    """Reads out the model calls that it is installed on.

    With ``active`` targets it gives, for each picture, the loss (B,) of each branch and ``gradient`` (B, C, H, W), that of
    the sum of the branches' losses with respect to z; ``sources`` are what they are compared with, by branch. Without, it
    keeps ``found`` (by branch): the readouts of targets ``recorded``, by default of those that need the source.

    Args: x, the latent (B, C, H, W) that the model is called on, in one call or in parts; percent, its place in the
    diffusion time; feature_steps, how often heads run for where the features should go (:mod:`...guidance.feature_target`).
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
        percent: float = 0.0,
        feature_steps: int = 1,
    ) -> None:
        self._backbone = backbone
        self._objective = objective
        self._x = x
        self._active = active
        self._sources = sources or {}
        self._recorded = recorded
        self._scope = scope
        self._percent = percent
        self._feature_steps = feature_steps
        self._prompts: dict[Any, int] = {}  # branches by their prompts' ids; empty: by their place in the call
        self._reading = True  # whether calls are read now
        self._only = False  # whether nothing is made of their predictions
        self._seen: set[Any] = set()  # parts that were read
        self._losses: dict[int, list[tuple[Part, Tensor]]] = {}
        self._gradients: dict[int, list[tuple[Part, Tensor]]] = {}
        self._found: dict[int, dict[Any, tuple[Part, SourceStep]]] = {}
        self._readouts: dict[int, list[tuple[Part, Tensor]]] = {}  # of the latest branch, by target
        self.called = 0  # network calls that came to it
        self.strange: tuple[int, int] | None = None  # the size of a call that shows no part of the pictures

    @property
    def guides(self) -> bool:
        """Whether there is a gradient."""
        return bool(self._gradients)

    def has(self, branch: int) -> bool:
        """Whether there is a loss of this branch."""
        return branch in self._losses

    def loss(self, branch: int = CONDITIONAL) -> Tensor:
        """(B,); of prompts that ran apart, the mean."""
        return together(self._losses[branch], self._x, torch.zeros(len(self._x), device=self._x.device))

    @property
    def gradient(self) -> Tensor:
        empty = torch.zeros(self._x.shape, device=self._x.device)
        return torch.stack([together(parts, self._x, empty) for parts in self._gradients.values()]).sum(0)

    @property
    def readouts(self) -> dict[int, Tensor]:
        """The latest readouts (B, D, H, W), by target."""
        return {i: stitched(parts, self._x) for i, parts in self._readouts.items()}

    @property
    def found(self) -> dict[int, SourceStep]:
        return {branch: whole_step(list(parts.values()), self._x) for branch, parts in self._found.items()}

    def install(self, options: dict[str, Any], guider: Any = None, branches: Sequence[int] = (), only: bool = False) -> Any:
        """Model options that let this reader see the network's calls.

        With a guider, its prompts tell the branches, and the ``branches`` to be guided run by themselves; the others run as
        they would, with the same attention kernels, so that cfg multiplies no difference between kernels, or, with ``only``,
        not at all.
        """
        options = comfy.model_patcher.create_model_options_clone(options)
        add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, self.apply_model, options, is_model_options=True)
        if guider is None:
            return options
        for branch, name in PROMPTS.items():
            self._prompts |= {cond.get("uuid"): branch for cond in guider.conds.get(name) or ()}
        if branches:
            self._reading, self._only = False, only
            calc = functools.partial(self._calculate_branches, guider, tuple(branches), only)
            add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, calc, options, is_model_options=True)
            if self._scope is not None:
                options["transformer_options"].setdefault("optimized_attention_override", ATTENTION[self._scope.graph])
        return options

    def _calculate_branches(
        self,
        guider: Any,
        branches: tuple[int, ...],
        only: bool,
        calculate: Any,
        model: Any,
        conds: list,
        x: Tensor,
        *args: Any,
    ) -> list[Tensor]:
        """The wrapper around calc_cond_batch. Each part is read once: other nodes (PAG, for one) run the same prompt again
        to another end."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        whole = x.shape == self._x.shape
        parts = parts_of(x, self._x)
        key = None if parts is None else tuple(part.key for part in parts)
        if not any(branch == CONDITIONAL for branch in self._prompts.values()) and conds and conds[0]:
            self._prompts |= {cond.get("uuid"): CONDITIONAL for cond in conds[0]}  # a guider with names of its own
        mine = [bool(cond) and self._prompts.get(cond[0].get("uuid")) in branches for cond in conds]
        if key in self._seen or not (any(mine) or whole):
            return calculate(model, conds, x, *args)
        if key is not None:
            self._seen.add(key)
        asked = [cond if own else None for cond, own in zip(conds, mine, strict=True)]
        present = {self._prompts[cond[0].get("uuid")] for cond in asked if cond}
        absent = [guider.conds[PROMPTS[b]] for b in branches if b not in present and PROMPTS[b] in guider.conds]  # cfg 1
        self._reading = True
        try:
            out = calculate(model, asked, x, *args)
            for cond in absent if whole else ():
                calculate(model, [None] * UNCONDITIONAL + [cond], x, *args)
        finally:
            self._reading = False
        others = [None if own or only else cond for cond, own in zip(conds, mine, strict=True)]
        if any(others):
            rest = calculate(model, others, x, *args)
            out = [a if own else b for a, b, own in zip(out, rest, mine, strict=True)]
        return out

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
        """The wrapper around BaseModel.apply_model: x (R, C, h, w), the rows of some prompts one after another."""
        options = transformer_options or {}
        if not self._reading:
            return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
        self.called += 1
        branches = self._branches(options)
        parts = parts_of(x, self._x, len(branches))
        if parts is None:
            self.strange = (x.shape[-2], x.shape[-1])
            return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
        model = executor.class_obj
        network = model.diffusion_model
        scale = input_scale(model, t, x)  # one for all rows of a call
        noise_level = t.expand(x.shape[0]) * scale.flatten()
        denoised = torch.zeros_like(x)
        if not self._active:
            with FeatureTap(network, self._backbone, end=self._only) as tap:
                with contextlib.suppress(Enough):
                    denoised = executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
                features, found_emb = tap.take()
            with torch.inference_mode(False), torch.no_grad():
                emb = self._backbone.emb(found_emb, noise_level)
                whole = Branch(features=features, emb=emb, z=self._x * scale[:1], noise_level=noise_level)
                for part in parts:
                    found = self._found.setdefault(branches[part.chunk], {})
                    if part.key not in found:
                        read = self._objective.part(part).source_step(self._rows(whole, part), self._recorded)
                        found[part.key] = part, read
            return denoised
        scope = self._scope
        if scope is None or scope.network is not network:
            scope = GradientScope(network, backbone=self._backbone)
        with scope, _beside_others(control, options, scope), FeatureTap(network, self._backbone, end=self._only) as tap:
            leaf = x.detach().clone().requires_grad_()
            given = (plain(t), plain(c_concat), plain(c_crossattn), plain(control))
            options = {**options, "optimized_attention_override": ATTENTION[scope.graph]}
            with contextlib.suppress(Enough):
                try:
                    denoised = executor(leaf, *given, options, **plain(kwargs))
                except RuntimeError:
                    if tap.heard or WrappersMP.DIFFUSION_MODEL not in options.get("wrappers", {}):
                        raise
                if not tap.heard:  # a cache answered in the network's place
                    wrappers = {**options.get("wrappers", {}), WrappersMP.DIFFUSION_MODEL: {}}
                    denoised = executor(leaf, *given, {**options, "wrappers": wrappers}, **plain(kwargs))
            features, found_emb = tap.take()
            z, level = self._x.clone() * scale[:1].clone(), plain(noise_level)
            whole = Branch(features=features, emb=plain(self._backbone.emb(found_emb, level)), z=z, noise_level=level)
            self._backward(leaf, whole, parts, branches, scale.clone(), light=scope.graph == "light")
        return denoised.detach()

    def _branches(self, options: dict[str, Any]) -> list[int]:
        """The branch of each prompt of a call."""
        places = options.get("cond_or_uncond", [CONDITIONAL])
        ids = options.get("uuids", [None] * len(places))
        return [self._prompts.get(uuid, place) for place, uuid in zip(places, ids, strict=True)]

    def _rows(self, read: Branch, part: Part) -> Branch:
        """A part's rows of a call; of z, its pictures."""
        assert read.noise_level is not None
        return Branch(
            features=[f.detach()[part.rows] for f in read.features],
            emb=read.emb[part.rows], z=part.of_pictures(read.z), noise_level=read.noise_level[part.rows],
            percent=self._percent,
        )  # fmt: skip

    def _backward(
        self, leaf: Tensor, read: Branch, parts: Sequence[Part], branches: Sequence[int], scale: Tensor, light: bool
    ) -> None:
        """The gradient in two parts: through the heads in fp32, one part and head at a time, then through the network.

        In between it is scaled by a power of two to a largest element of 1..2, so that half precision neither underflows nor
        overflows.
        """
        shapes = [f.shape[1:] for f in read.features]
        rows = torch.cat([f.detach().float().flatten(1) for f in read.features], 1)
        outputs = torch.zeros_like(rows, dtype=read.features[0].dtype)
        gains = []
        for part in parts:
            features, objective = rows[part.rows], self._objective.part(part)
            evaluate = functools.partial(
                self._loss_and_gradient, objective, self._rows(read, part), self._sources.get(branches[part.chunk]), shapes,
                light,
            )  # fmt: skip
            loss, found, readouts = evaluate(features)
            for i, readout in readouts.items():
                self._readouts.setdefault(i, []).append((part, readout))
            if self._feature_steps > 1 and objective.reaches_zero(self._active):
                found = feature_gap(features, (loss, found), evaluate, self._feature_steps)
            self._losses.setdefault(branches[part.chunk], []).append((part, loss))
            largest = found.abs().amax()
            gain = torch.where(torch.isfinite(largest) & (largest > 0), torch.exp2(-largest.log2().floor()), 1.0)
            outputs[part.rows] = found * gain
            gains.append(gain)
        handed = [output.to(f.dtype) for output, f in zip(_maps(outputs, shapes), read.features, strict=True)]
        (gradient,) = torch.autograd.grad(read.features, leaf, handed)
        for part, gain in zip(parts, gains, strict=True):
            moved = gradient[part.rows].float() / gain / scale[part.rows].float()
            self._gradients.setdefault(branches[part.chunk], []).append((part, moved))

    def _loss_and_gradient(
        self, objective: Objective, branch: Branch, source: SourceStep | None, shapes: Sequence[torch.Size], light: bool,
        features: Tensor,
    ) -> tuple[Tensor, Tensor, dict[int, Tensor]]:  # fmt: skip
        """The loss (B,), its gradient with respect to features (B, N), and readouts by target; a head at a time."""
        total = found = torch.zeros(())
        readouts: dict[int, Tensor] = {}
        for targets in objective.by_head(self._active):
            leaf = features.detach().requires_grad_()
            loss, read = objective.loss(
                dataclasses.replace(branch, features=_maps(leaf, shapes)), targets, source, light=light
            )
            total = total + loss.detach()
            readouts |= {i: readout.detach() for i, readout in read.items()}
            found = torch.autograd.grad(loss.sum(), leaf)[0] + found
        return total, found, readouts


def _maps(features: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Maps (B, C_i, H_i, W_i) that lie in rows (B, N)."""
    pieces = features.split([shape.numel() for shape in shapes], 1)
    return [piece.unflatten(1, shape) for piece, shape in zip(pieces, shapes, strict=True)]


def _beside_others(control: Any, options: dict[str, Any], scope: GradientScope) -> contextlib.AbstractContextManager[Any]:
    """ControlNets' outputs are added in place, and transformers' blocks and other nodes' patches do what inference allows.

    Making room for that slows every operation a little, so it is on only then.
    """
    return beside_other_nodes(
        bool(scope.writes or control is not None or options.get("patches") or options.get("patches_replace"))
    )
