"""The guided step inside ComfyUI: what happens at one model call of a sampler that begins a guided step.

Shapes: x (B, C, H, W) the sampler's latent, z = x * scale the network's input, timestep (B,) sigmas.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import comfy.model_management
import comfy.model_patcher
import comfy.samplers
import torch
from torch import Tensor

from ...guidance import ReferenceUpdate, SourceStep, norm_ratio_length, rms_step
from ...guidance.pictures import spread
from ...guidance.schedule import PATH_WHERE_MADE, PlannedStep
from ..loaded.memory import is_out_of_memory
from .branches import CONDITIONAL, UNCONDITIONAL, BranchReader
from .run import ModelCall, Run, without_readers

log = logging.getLogger("readout_guidance")
KEY = "readout_guidance"
Result = TypeVar("Result")
#: Why a planned step was not guided.
NOTHING_ACTIVE = "no prompt was active"
STRANGE = (
    "the network was given a picture of {}x{} cells that is no part of the one being made (another node enlarges, shrinks "
    "or changes it): bypass that node for the guided steps"
)


def source_step(run: Run, planned: PlannedStep, call: ModelCall) -> Tensor:
    """A step of the source: the plain prediction, its readouts kept."""
    reader = run.reader(call.x, planned)
    run.source.latents[planned.step] = call.x.to("cpu", copy=True)  # the sampler may go on to change it in place
    denoised = call.predict(reader.install(call.options, call.guider), call.x)
    for branch in _branches(run, call):
        if branch not in reader.found:  # not part of the plain prediction (cfg 1)
            call.read(reader, (branch,))
    model = call.guider.inner_model
    for branch, found in reader.found.items():
        if branch in _branches(run, call):
            run.source.keep((planned.step, branch), found, model.manual_cast_dtype or model.get_dtype())
    return denoised


def one_pass_step(run: Run, planned: PlannedStep, call: ModelCall) -> Tensor:
    """fast and norm_ratio: one pass of the conditional branch gives both the gradient and the prediction.

    The prediction is of x as it was, and x moves against the gradient where the sampler goes from here. (So the noise that
    the model saw in x is kept; of a flow model, the velocity.) Of several moves only the last one's pass predicts. Where too
    little noise is left for the model to answer a move, all are made before the prediction.
    """
    call = _held(run, planned, call)
    length: float | Tensor = planned.length / planned.moves
    at_once = run.settings.mode == "fast" and _unanswered(planned, call, length)
    for _ in range(planned.moves if at_once else planned.moves - 1):
        reader, _nothing = _read_guided(run, planned, (CONDITIONAL,), call)
        if not _noted(run, planned, reader, (CONDITIONAL,)):
            return call.plain()
        call = _moved(run, planned, call, reader.gradient, PATH_WHERE_MADE * length)
    if at_once:
        return call.plain()
    reader, denoised = _predict_guided(run, planned, call)
    if not _noted(run, planned, reader, (CONDITIONAL,)):
        return denoised
    if run.settings.mode == "norm_ratio":
        length = norm_ratio_length(call.x * call.scale, _next_z(run, planned, call, denoised), run.settings.strength)
        if _unanswered(planned, call, length):
            return _moved(run, planned, call, reader.gradient, length).plain()
    move = _move(run, planned, call, reader.gradient, length, planned.lands)
    lands = call.scale_at(planned.lands)
    assert run.frame is not None
    run.frame.move_next(lambda sigma: move * (lands / call.scale_at(sigma.flatten()[:1].expand(len(move)))))
    return denoised


def _unanswered(planned: PlannedStep, call: ModelCall, length: float | Tensor) -> bool:
    """Whether a move is longer than the noise that is left where it lands, so that the model would not answer it there."""
    return bool((call.noise_at(planned.lands) < torch.as_tensor(length, device=call.x.device)).any())


def _moved(run: Run, planned: PlannedStep, call: ModelCall, gradient: Tensor, length: float | Tensor) -> ModelCall:
    """The call from where x is after a move, measured at the call."""
    moved = call.x + _move(run, planned, call, gradient, length, planned.sigma)
    run.move(moved - call.x)
    return dataclasses.replace(call, x=moved)


def _move(run: Run, planned: PlannedStep, call: ModelCall, gradient: Tensor, length: float | Tensor, lands: float) -> Tensor:
    """The move of x against the gradient, so long in z where it lands, though never longer than the noise there."""
    strengths = run.settings.strengths_at(planned.percent, len(call.x))
    length = torch.minimum(torch.as_tensor(length, device=call.x.device), call.noise_at(lands))
    length = length if strengths is None else length * spread(strengths.to(call.x.device), call.x)
    move = rms_step(gradient, length) / call.scale_at(lands)
    return _inside(run, move).to(call.x.dtype)


def _predict_guided(run: Run, planned: PlannedStep, call: ModelCall) -> tuple[BranchReader, Tensor]:
    """The prediction, and a reader that read its positive prompt on the way."""

    def predict(reader: BranchReader) -> Tensor:
        if without_readers(call.options) is not call.options:  # another guidance reads this call: each by itself
            call.read(reader, (CONDITIONAL,))
            return call.plain()
        options = call.options
        if run.kept_prompt is not None:  # a picture that does not move here is made by both prompts
            strengths = run.settings.strengths_at(planned.percent, len(call.x))
            moving = strengths is None or bool((strengths > 0).all())
            options = run.kept_prompt.install(options, guided=moving)
        denoised = call.predict(reader.install(options, call.guider, (CONDITIONAL,)), call.x)
        if not reader.called:  # a cache answered in the model's place
            call.read(reader, (CONDITIONAL,))
        return denoised

    return _with_light_graph_if_needed(run, planned, (CONDITIONAL,), call, predict)


def _read_guided(
    run: Run, planned: PlannedStep, branches: Sequence[int], call: ModelCall
) -> tuple[BranchReader, BranchReader]:
    """A reader that read guided branches by themselves."""
    return _with_light_graph_if_needed(run, planned, branches, call, lambda reader: call.read(reader, branches))


def _next_z(run: Run, planned: PlannedStep, call: ModelCall, denoised: Tensor) -> Tensor:
    """z where a deterministic step of the schedule would take x."""
    next_sigma = run.sigmas[planned.step + 1]
    ratio = spread(next_sigma / call.timestep, call.x)
    return (denoised + (call.x - denoised) * ratio) * call.scale_at(next_sigma)


def reference_step(run: Run, planned: PlannedStep, call: ModelCall) -> Tensor:
    """The paper's step: AdamW on z with the loss of both branches, then the plain prediction at the moved latent."""
    call = _held(run, planned, call)
    x, scale, lands = call.x, call.scale, call.scale_at(planned.lands)
    strengths = run.settings.strengths_at(planned.percent, len(x))
    with torch.inference_mode(False):
        z = x.clone() * scale.clone()
        update = ReferenceUpdate(z, run.settings.strength)
    branches = _branches(run, call)
    for _ in range(run.settings.iterations):
        reader, _read = _read_guided(run, planned, branches, call)
        if not _noted(run, planned, reader, branches):
            break
        with torch.inference_mode(False):
            move = (update.step(reader.gradient) - z) / lands.clone()
        move = move if strengths is None else move * spread(strengths.to(x.device), x)
        call = dataclasses.replace(call, x=x + _inside(run, move).to(x.dtype))
    run.move(call.x - x)
    return call.plain()


def _noted(run: Run, planned: PlannedStep, reader: BranchReader, branches: Sequence[int]) -> bool:
    """Whether the reader has read what guides; keeps the losses, or the reason why not."""
    if not reader.guides:
        reason = NOTHING_ACTIVE if not reader.called else STRANGE.format(*(reader.strange or (0, 0)))
        run.skipped[reason] = run.skipped.get(reason, 0) + 1
        return False
    run.losses += [reader.loss(branch) for branch in branches if reader.has(branch)]
    run.readouts = reader.readouts
    run.guided.add(planned.step)
    return True


def _branches(run: Run, call: ModelCall) -> tuple[int, ...]:
    """Whose loss counts: the conditional one's; in reference mode the unconditional one's too, and first."""
    if run.settings.mode == "reference" and call.guider.conds.get("negative") is not None:
        return (UNCONDITIONAL, CONDITIONAL)
    return (CONDITIONAL,)


def _with_light_graph_if_needed(
    run: Run, planned: PlannedStep, branches: Sequence[int], call: ModelCall,
    work: Callable[[BranchReader], Result],
) -> tuple[BranchReader, Result]:  # fmt: skip
    """A reader of guided branches and what ``work`` makes of it. Without the memory for it, once more with the light
    graph."""
    try:
        reader = _guided_reader(run, planned, branches, call)
        return reader, work(reader)
    except Exception as error:
        if run.graph == "light" or not is_out_of_memory(error):
            raise
        log.warning("Readout guidance: out of memory; going on with the light graph, which takes longer.")
    run.use_graph("light", call.guider)
    comfy.model_management.soft_empty_cache()
    reader = _guided_reader(run, planned, branches, call)
    return reader, work(reader)


def _guided_reader(run: Run, planned: PlannedStep, branches: Sequence[int], call: ModelCall) -> BranchReader:
    """A reader of guided branches, with the readouts of source and references that they are compared with."""
    sources: dict[int, SourceStep] = {}
    for branch in branches:
        source = run.source.step((planned.step, branch), call.x.device)
        for i in sorted(set(run.references) & set(planned.active)):
            step = _reference(run, planned, branch, i, call)
            if step is not None:
                readouts = {**({} if source is None else source.readouts), **step.readouts}
                source = dataclasses.replace(source or step, readouts=readouts)
        if source is not None:
            sources[branch] = source
    return run.reader(call.x, planned, active=planned.active, sources=sources)


def _reference(run: Run, planned: PlannedStep, branch: int, i: int, call: ModelCall) -> SourceStep | None:
    """What target i's head reads in its reference, noised to this step; None where no prompt is active."""
    key = (planned.step, branch, i)
    if key not in run.reference_steps:
        sampling = call.guider.inner_model.model_sampling
        noised = sampling.noise_scaling(call.timestep[:1], run.noise, run.references[i], False)
        found = call.read(run.reader(noised, planned, recorded=(i,)), (branch,), noised).found
        if branch not in found:
            return None
        run.reference_steps[key] = found[branch]
    return run.reference_steps[key]


def _held(run: Run, planned: PlannedStep, call: ModelCall) -> ModelCall:
    """The call with the source's latent where a drag's mask lets nothing move."""
    assert run.objective is not None
    movable, source = run.objective.movable, run.source.latents.get(planned.step)
    if movable is None or source is None:
        return call
    source = source.to(call.x)
    held = source + (call.x - source) * spread(movable.to(call.x.dtype), call.x)
    run.move(held - call.x)
    return dataclasses.replace(call, x=held)


def _inside(run: Run, move: Tensor) -> Tensor:
    """A move where there is one to be made: of what is denoised, and of what a drag's mask lets move."""
    movable = None if run.objective is None else run.objective.movable
    for mask in (run.denoise_mask, movable):
        move = move if mask is None else move * spread(mask.to(move.dtype), move)
    return move
