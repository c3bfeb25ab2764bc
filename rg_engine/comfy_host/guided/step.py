"""The guided step inside ComfyUI: what happens at one model call of a sampler that begins a guided step.

Shapes: x (B, C, H, W) the sampler's latent, z = x * scale the network's input, timestep (B,) sigmas.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any

import comfy.model_management
import comfy.model_patcher
import torch
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from torch import Tensor

from ...features import Backbone
from ...guidance import GuidanceSettings, Objective, Plan, ReferenceUpdate, SourceStep, norm_ratio_length, rms_step
from ...guidance.schedule import PlannedStep
from ...guidance.targets import fit
from ..loaded.gradient_scope import GradientScope, Graph
from ..loaded.memory import is_out_of_memory
from ..loaded.model import input_scale
from .branches import ATTENTION, CONDITIONAL, UNCONDITIONAL, BranchReader
from .sampler_steps import SamplerSteps
from .source_pass import SourcePass

log = logging.getLogger("readout_guidance")
KEY = "readout_guidance"
Options = dict[str, Any]


@dataclasses.dataclass(kw_only=True)
class Run:
    """The state of one sampling run."""

    settings: GuidanceSettings
    backbone: Backbone
    plan: Plan
    sampler: Any
    sigmas: list[float]
    graph: Graph = "full"  # what is kept for backward
    objective: Objective | None = None
    noise: Tensor | None = None
    denoise_mask: Tensor | None = None
    steps: SamplerSteps | None = None
    scope: GradientScope | None = None
    recording: bool = False  # the source pass is under way
    source: SourcePass = dataclasses.field(default_factory=SourcePass)
    references: dict[int, Tensor] = dataclasses.field(default_factory=dict)  # latents in the model's scale, by target
    reference_steps: dict[tuple[int, int, int], SourceStep] = dataclasses.field(default_factory=dict)  # and by target
    losses: list[Tensor] = dataclasses.field(default_factory=list)  # (B,) each, in call order
    readouts: dict[int, Tensor] = dataclasses.field(default_factory=dict)  # the latest, by target

    def begin(self, guider: Any, objective: Objective, noise: Tensor, denoise_mask: Tensor | None, seed: int | None) -> None:
        """Set what is known once the model is loaded."""
        if not bool(noise.any()):  # the latent comes with its noise; references need some all the same
            generator = torch.Generator().manual_seed(seed or 0)
            noise = torch.randn(noise.shape, generator=generator).to(noise)
        self.objective, self.noise, self.denoise_mask = objective, noise, denoise_mask
        self.use_graph(self.graph, guider)
        for i, target in enumerate(objective.targets):
            if target.needs_reference and target.reference_latent is not None:
                latent = guider.inner_model.process_latent_in(target.reference_latent.to(noise))
                self.references[i] = fit(latent, objective.size).expand_as(noise)

    def use_graph(self, graph: Graph, guider: Any) -> None:
        self.graph, self.scope = graph, GradientScope(guider.inner_model.diffusion_model, graph)

    def reader(self, x: Tensor, **settings: Any) -> BranchReader:
        assert self.objective is not None
        return BranchReader(self.backbone, self.objective, x, scope=self.scope, **settings)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelCall:
    """One call of the model by the sampler; ``predict`` carries it out, with options that may differ from its own."""

    guider: Any
    x: Tensor
    timestep: Tensor
    options: Options
    predict: Callable[[Options], Tensor]

    def run(self, reader: BranchReader, branches: Sequence[int], x: Tensor | None = None) -> dict[int, Tensor]:
        """The predictions of some branches by themselves, read out by ``reader``."""
        return reader.run(self.guider, branches, self.x if x is None else x, self.timestep, self.options)

    @property
    def scale(self) -> Tensor:
        """z / x, (B, 1, 1, 1)."""
        return input_scale(self.guider.inner_model, self.timestep, self.x)


def source_step(run: Run, planned: PlannedStep, call: ModelCall) -> Tensor:
    """A step of the source: the plain prediction, its readouts kept."""
    reader = run.reader(call.x)
    run.source.latents[planned.step] = call.x.to("cpu", copy=True)  # the sampler may go on to change it in place
    denoised = call.predict(reader.install(call.options))
    for branch in _branches(run, call):
        if branch not in reader.found:  # not part of the plain prediction (cfg 1)
            call.run(reader, (branch,))
        model = call.guider.inner_model
        run.source.keep((planned.step, branch), reader.found[branch], model.manual_cast_dtype or model.get_dtype())
    return denoised


def one_pass_step(run: Run, planned: PlannedStep, call: ModelCall) -> Tensor:
    """fast and norm_ratio: one pass of the conditional branch gives both the gradient and the prediction.

    x moves against the gradient; the noise that the model saw in x is kept, so the prediction moves with it.
    """
    x, scale = call.x, call.scale
    reader, predictions = _read_guided(run, planned, (CONDITIONAL,), call)
    prediction = predictions[CONDITIONAL]
    run.losses.append(reader.loss())
    run.readouts = reader.readouts
    denoised = call.predict(_reusing(prediction, call, run.graph) if reader.whole else call.options)
    length: float | Tensor = planned.length
    if run.settings.mode == "norm_ratio":
        length = norm_ratio_length(x * scale, _next_z(run, planned, call, denoised), run.settings.strength)
    move = _inside(rms_step(reader.gradient, length) / scale, run.denoise_mask).to(x.dtype)
    moved = _kept_still(run, planned, x + move)
    move = moved - x
    _move(run, x, moved, scale)
    if run.sigmas[planned.step + 1] == 0:  # no later step would take up the move: predict once more, from where x is now
        return call.predict(call.options)
    return denoised + move


def _reusing(prediction: Tensor, call: ModelCall, graph: Graph) -> Options:
    """Options under which the call's positive prompt is not run again: its prediction is there already.

    Other prompts run with the attention kernels that it ran with, so that cfg multiplies no difference between kernels.
    """
    positive, used = call.guider.conds["positive"], False

    def calc(calculate: Any, model: Any, conds: list, x: Tensor, *args: Any) -> list[Tensor]:
        nonlocal used  # other nodes (PAG, for one) run the same prompt again to another end
        if used or x is not call.x or conds[0] is not positive:
            return calculate(model, conds, x, *args)
        used = True
        return [prediction, *calculate(model, [None, *conds[1:]], x, *args)[1:]]

    options = comfy.model_patcher.create_model_options_clone(call.options)
    add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, calc, options, is_model_options=True)
    options["transformer_options"].setdefault("optimized_attention_override", ATTENTION[graph])
    return options


def _next_z(run: Run, planned: PlannedStep, call: ModelCall, denoised: Tensor) -> Tensor:
    """z where a deterministic step of the schedule would take x."""
    next_sigma = torch.full_like(call.timestep, run.sigmas[planned.step + 1])
    ratio = (next_sigma / call.timestep).view(-1, 1, 1, 1)
    return (denoised + (call.x - denoised) * ratio) * input_scale(call.guider.inner_model, next_sigma, call.x)


def reference_step(run: Run, planned: PlannedStep, call: ModelCall) -> Tensor:
    """The paper's step: AdamW on z with the loss of both branches, then the plain prediction at the moved latent."""
    x, scale, before = call.x, call.scale, call.x.clone()
    with torch.inference_mode(False):
        update = ReferenceUpdate(before.clone() * scale.clone(), run.settings.strength)
    branches = _branches(run, call)
    for _ in range(run.settings.iterations):
        reader, _ = _read_guided(run, planned, branches, call)
        run.losses += [reader.loss(branch) for branch in branches]
        run.readouts = reader.readouts
        with torch.inference_mode(False):
            z = update.step(reader.gradient)
        moved = before + _inside(z / scale - before, run.denoise_mask).to(x.dtype)
        _move(run, x, _kept_still(run, planned, moved), scale)
    return call.predict(call.options)


def _branches(run: Run, call: ModelCall) -> tuple[int, ...]:
    """Whose loss counts: the conditional one's; in reference mode the unconditional one's too, and first."""
    if run.settings.mode == "reference" and call.guider.conds.get("negative") is not None:
        return (UNCONDITIONAL, CONDITIONAL)
    return (CONDITIONAL,)


def _read_guided(
    run: Run, planned: PlannedStep, branches: Sequence[int], call: ModelCall
) -> tuple[BranchReader, dict[int, Tensor]]:
    """Guided branches, read out, and their predictions. Without the memory for it, once more with the light graph."""
    try:
        reader = _guided_reader(run, planned, branches, call)
        return reader, call.run(reader, branches)
    except Exception as error:
        if run.graph == "light" or not is_out_of_memory(error):
            raise
        log.warning("Readout guidance: out of memory; going on with the light graph, which takes longer.")
    run.use_graph("light", call.guider)
    comfy.model_management.soft_empty_cache()
    reader = _guided_reader(run, planned, branches, call)
    return reader, call.run(reader, branches)


def _guided_reader(run: Run, planned: PlannedStep, branches: Sequence[int], call: ModelCall) -> BranchReader:
    """A reader of guided branches, with the readouts of source and references that they are compared with."""
    sources: dict[int, SourceStep] = {}
    for branch in branches:
        source = run.source.step((planned.step, branch), call.x.device)
        for i in sorted(set(run.references) & set(planned.active)):
            step = _reference(run, planned, branch, i, call)
            readouts = {**({} if source is None else source.readouts), **step.readouts}
            source = dataclasses.replace(source or step, readouts=readouts)
        if source is not None:
            sources[branch] = source
    return run.reader(call.x, active=planned.active, sources=sources)


def _reference(run: Run, planned: PlannedStep, branch: int, i: int, call: ModelCall) -> SourceStep:
    """What target i's head reads in its reference, noised to this step."""
    key = (planned.step, branch, i)
    if key not in run.reference_steps:
        sampling = call.guider.inner_model.model_sampling
        noised = sampling.noise_scaling(call.timestep[:1], run.noise, run.references[i], False)
        reader = run.reader(call.x, recorded=(i,))
        call.run(reader, (branch,), noised)
        run.reference_steps[key] = reader.found[branch]
    return run.reference_steps[key]


def _move(run: Run, x: Tensor, moved: Tensor, scale: Tensor) -> None:
    """Move x, and the sampler's own latent where that is another tensor, in place and by the same amount."""
    steps = run.steps
    assert steps is not None
    if steps.moved_afterwards:
        waiting = (moved - x) * scale
        steps.waiting_move = waiting if steps.waiting_move is None else steps.waiting_move + waiting
    elif steps.latent is not None and steps.latent is not x:
        steps.latent += moved - x
    x.copy_(moved)


def _kept_still(run: Run, planned: PlannedStep, x: Tensor) -> Tensor:
    """x with the source's latent where a drag's mask lets nothing move."""
    assert run.objective is not None
    movable, source = run.objective.movable, run.source.latents.get(planned.step)
    if movable is None or source is None:
        return x
    source = source.to(x)
    return source + (x - source) * movable.to(x.dtype)


def _inside(move: Tensor, denoise_mask: Tensor | None) -> Tensor:
    return move if denoise_mask is None else move * denoise_mask.to(move.dtype)
