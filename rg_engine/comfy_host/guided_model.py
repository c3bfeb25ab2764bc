"""Readout guidance on a ComfyUI model: a clone of its patcher with four wrappers, and nothing else.

Because the guidance travels with the model, every sampler node, guider and sampler of ComfyUI works with it as it is:

    OUTER_SAMPLE      plans the guided steps; without any, everything below stands aside
    PREPARE_SAMPLING  asks for the memory that the gradient's graph needs, before the model is loaded
    SAMPLER_SAMPLE    runs the source pass first, where a target needs it
    PREDICT_NOISE     the guided step
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator
from typing import Any

import comfy.model_patcher
import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from torch import Tensor

from ..features import Backbone, check_head_fits, detect_backbone
from ..guidance import GuidanceSettings, Objective, Plan, ReferenceUpdate, SourceStep, Target, chain, make_plan, rms_step
from ..guidance.schedule import PlannedStep
from ..guidance.targets import fit
from .branches import CONDITIONAL, UNCONDITIONAL, BranchReader, input_scale
from .memory import with_room_for_graph
from .sampler_steps import SamplerSteps, watched

log = logging.getLogger("readout_guidance")

KEY = "readout_guidance"


def guide(model: Any, target: Target | None, settings: GuidanceSettings) -> Any:
    """A clone of ``model`` (a ModelPatcher) that is guided by ``target`` whenever it is sampled.

    Raises BackboneError if the model can't be tapped or a head doesn't fit it.
    """
    targets = chain(target)
    guided = model.clone()
    if not targets or settings.strength == 0:
        return guided
    backbone = backbone_of(model)
    for each in targets:
        check_fits(each.head, backbone)
    guidance = ModelGuidance(targets, settings, backbone)
    for kind, wrapper in (
        (WrappersMP.OUTER_SAMPLE, guidance.outer_sample),
        (WrappersMP.PREPARE_SAMPLING, guidance.prepare_sampling),
        (WrappersMP.SAMPLER_SAMPLE, guidance.sampler_sample),
        (WrappersMP.PREDICT_NOISE, guidance.predict_noise),
    ):
        guided.add_wrapper_with_key(kind, KEY, wrapper)
    return guided


def backbone_of(model: Any) -> Backbone:
    """The taps of a ModelPatcher's network. Raises BackboneError if it has none that are known."""
    return detect_backbone(model.get_model_object("diffusion_model"))


def check_fits(head: Any, backbone: Backbone) -> None:
    check_head_fits(
        backbone,
        head_name=head.name,
        trained_on=head.spec.backbone,
        feature_channels=head.spec.feature_channels,
        emb_width=head.emb_width,
    )


@dataclasses.dataclass
class _Run:
    """The state of one sampling run."""

    plan: Plan
    sampler: Any
    sigmas: list[float]
    objective: Objective | None = None
    steps: SamplerSteps | None = None
    recording: bool = False
    source: dict[tuple[int, int], SourceStep] = dataclasses.field(default_factory=dict)  # by (step, branch)
    denoise_mask: Tensor | None = None
    noise: Tensor | None = None
    references: dict[int, Tensor] = dataclasses.field(default_factory=dict)  # by target, in the model's scale
    reference_steps: dict[tuple[int, int, int], SourceStep] = dataclasses.field(default_factory=dict)  # and by target
    losses: list[Tensor] = dataclasses.field(default_factory=list)  # (B,) each, in call order


class ModelGuidance:
    """The wrappers of one guided clone. What a run needs lives in ``_run`` and goes with it."""

    def __init__(self, targets: tuple[Target, ...], settings: GuidanceSettings, backbone: Backbone) -> None:
        self.targets = targets
        self.settings = settings
        self.backbone = backbone
        self.losses: list[Tensor] = []  # of the last run, each branch's (B,), in call order
        self._run: _Run | None = None

    def outer_sample(
        self, executor: Any, noise: Tensor, latent_image: Tensor, sampler: Any, sigmas: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        model_sampling = executor.class_obj.model_patcher.get_model_object("model_sampling")
        for target in self.targets:
            target.check_batch(noise.shape[0])
        schedule = [float(s) for s in sigmas]
        ranges = [(target.start_percent, target.end_percent) for target in self.targets]
        plan = make_plan(ranges, schedule, self.settings, lambda p: float(model_sampling.percent_to_sigma(p)))
        if not plan.steps:
            return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        self._run = run = _Run(plan=plan, sampler=sampler, sigmas=schedule)
        try:
            out = executor(noise, latent_image, watched(sampler, lambda: run.steps), sigmas, *args, **kwargs)
        finally:
            self._run = None
        self._report(run)
        return out

    def prepare_sampling(self, executor: Any, model: Any, noise_shape: Any, *args: Any, **kwargs: Any) -> Any:
        if self._run is not None:
            noise_shape = with_room_for_graph(model, self.backbone, noise_shape)
        return executor(model, noise_shape, *args, **kwargs)

    def sampler_sample(
        self,
        executor: Any,
        guider: Any,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Callable[..., Any] | None,
        noise: Tensor,
        latent_image: Tensor | None = None,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        run = self._run
        if run is None:
            return executor(guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask, disable_pbar)
        with _heads_on(self.targets, noise.device):
            with torch.inference_mode(False):
                run.objective = Objective(self.targets, (noise.shape[-2], noise.shape[-1]), noise.shape[0], noise.device)
            run.denoise_mask, run.noise = denoise_mask, noise
            for i, target in enumerate(self.targets):
                if target.needs_reference:
                    latent = guider.inner_model.process_latent_in(target.reference_latent.to(noise))  # type: ignore[union-attr]
                    run.references[i] = fit(latent, run.objective.size).expand_as(noise)
            passes = 2 if run.objective.needs_source else 1

            def sample(number: int) -> Tensor:
                run.steps = steps = SamplerSteps(run.plan, run.sampler, run.sigmas)

                def report(step: int, x0: Tensor, x: Tensor, total: int) -> None:
                    steps.finished_step()
                    if callback is not None:
                        callback(number * total + step, x0, x, passes * total)

                return executor(guider, sigmas, dict(extra_args), report, noise, latent_image, denoise_mask, disable_pbar)

            if passes == 2:
                run.recording = True
                with _random_state_kept(noise.device), _cfg(guider, self.settings.source_cfg):
                    sample(0)
                run.recording = False
            return sample(passes - 1)

    def predict_noise(
        self,
        executor: Any,
        x: Tensor,
        timestep: Tensor,
        model_options: dict[str, Any] | None = None,
        seed: int | None = None,
    ) -> Tensor:
        run, options = self._run, model_options or {}
        planned = run.steps.planned(float(timestep.flatten()[0])) if run is not None and run.steps is not None else None
        if run is None or planned is None:
            return executor(x, timestep, options, seed)
        guider = executor.class_obj
        if run.recording:
            return self._record(run, planned, executor, guider, x, timestep, options, seed)
        if self.settings.mode == "reference":
            self._reference_step(run, planned, guider, x, timestep, options)
            return executor(x, timestep, options, seed)
        return self._fast_step(run, planned, executor, guider, x, timestep, options, seed)

    def _record(
        self,
        run: _Run,
        planned: PlannedStep,
        executor: Any,
        guider: Any,
        x: Tensor,
        timestep: Tensor,
        options: dict,
        seed: Any,
    ) -> Tensor:
        """A step of the source: the plain prediction, its readouts kept."""
        assert run.objective is not None
        reader = BranchReader(self.backbone, run.objective, x)
        denoised = executor(x, timestep, reader.install(options), seed)
        wanted = self._branches(guider)
        for branch in wanted:
            if branch not in reader.source:  # not part of the plain prediction (cfg 1)
                reader.run(guider, branch, x, timestep, options)
        run.source.update({(planned.step, branch): reader.source[branch] for branch in wanted})
        return denoised

    def _fast_step(
        self,
        run: _Run,
        planned: PlannedStep,
        executor: Any,
        guider: Any,
        x: Tensor,
        timestep: Tensor,
        options: dict,
        seed: Any,
    ) -> Tensor:
        """One pass of the conditional branch gives the gradient and the prediction; x moves against the one.

        The noise that the model sees in x is kept, so the prediction moves with x.
        """
        assert run.objective is not None
        reader = self._reader(run, planned, CONDITIONAL, guider, x, timestep, options)
        prediction = reader.run(guider, CONDITIONAL, x, timestep, options)
        run.losses.append(reader.loss)
        before = x.clone()
        scale = input_scale(guider.inner_model, timestep, x)
        move = rms_step(reader.gradient, planned.length) / scale
        move = _inside(move, run.denoise_mask).to(x.dtype)
        self._move(run, x, x + move, scale)
        if not reader.whole:
            return executor(x, timestep, options, seed)
        positive = guider.conds["positive"]

        def calc(calculate: Any, model: Any, conds: list, x_in: Tensor, *args: Any) -> list[Tensor]:
            if x_in is not x or conds[0] is not positive:
                return calculate(model, conds, x_in, *args)
            out = calculate(model, [None, *conds[1:]], before, *args)
            return [prediction + move, *(each + move for each in out[1:])]

        options = comfy.model_patcher.create_model_options_clone(options)
        add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, calc, options, is_model_options=True)
        return executor(x, timestep, options, seed)

    def _reference_step(
        self, run: _Run, planned: PlannedStep, guider: Any, x: Tensor, timestep: Tensor, options: dict
    ) -> None:
        """The paper's update: AdamW on z, with the loss of both branches."""
        scale, before = input_scale(guider.inner_model, timestep, x), x.clone()
        with torch.inference_mode(False), torch.enable_grad():
            update = ReferenceUpdate(before.clone() * scale.clone(), self.settings.strength)
        for _ in range(self.settings.iterations):
            gradient: Tensor | None = None
            for branch in self._branches(guider):
                reader = self._reader(run, planned, branch, guider, x, timestep, options)
                reader.run(guider, branch, x, timestep, options)
                run.losses.append(reader.loss)
                gradient = reader.gradient if gradient is None else gradient + reader.gradient
            assert gradient is not None
            with torch.inference_mode(False):
                z = update.step(gradient.clone())
            moved = z / scale
            self._move(run, x, before + _inside(moved - before, run.denoise_mask).to(x.dtype), scale)

    def _reader(
        self, run: _Run, planned: PlannedStep, branch: int, guider: Any, x: Tensor, timestep: Tensor, options: dict
    ) -> BranchReader:
        """A reader of one guided branch, with the readouts of source and references that it is compared with."""
        assert run.objective is not None
        assert run.noise is not None
        source = run.source.get((planned.step, branch))
        for i, latent in run.references.items():
            key = (planned.step, branch, i)
            if i in planned.active and key not in run.reference_steps:
                noised = guider.inner_model.model_sampling.noise_scaling(timestep[:1], run.noise, latent, False)
                reader = BranchReader(self.backbone, run.objective, x, recorded=(i,))
                reader.run(guider, branch, noised, timestep, options)
                run.reference_steps[key] = reader.source[branch]
            if i in planned.active:
                step = run.reference_steps[key]
                readouts = {**({} if source is None else source.readouts), **step.readouts}
                source = dataclasses.replace(source or step, readouts=readouts)
        return BranchReader(self.backbone, run.objective, x, active=planned.active, source=source)

    def _branches(self, guider: Any) -> tuple[int, ...]:
        """Whose loss counts: the conditional one; in reference mode the unconditional one too, and first."""
        if self.settings.mode == "reference" and guider.conds.get("negative") is not None:
            return (UNCONDITIONAL, CONDITIONAL)
        return (CONDITIONAL,)

    def _move(self, run: _Run, x: Tensor, moved: Tensor, scale: Tensor) -> None:
        """Move x, and the sampler's own latent where that is another tensor, in place and by the same amount."""
        steps = run.steps
        assert steps is not None
        if steps.moved_afterwards:
            waiting = (moved - x) * scale
            steps.waiting_move = waiting if steps.waiting_move is None else steps.waiting_move + waiting
        elif steps.latent is not None and steps.latent is not x:
            steps.latent += moved - x
        x.copy_(moved)

    def _report(self, run: _Run) -> None:
        self.losses = run.losses
        missed = run.steps.missed if run.steps is not None else 0
        if missed:
            log.warning(
                "Readout guidance: %d of %d planned steps were not guided: the sampler did not evaluate the model at "
                "the schedule's noise levels. Use another sampler for full control.",
                missed,
                len(run.plan.steps),
            )
        if run.losses:
            losses = torch.stack([loss.mean() for loss in run.losses]).tolist()
            log.info(
                "Readout guidance: %d of %d steps guided, loss %.4g -> %.4g",
                len(run.plan.steps) - missed, len(run.sigmas) - 1, losses[0], losses[-1],
            )  # fmt: skip
            if not all(map(torch.isfinite, run.losses[-1])):
                log.warning("Readout guidance: the loss is not finite; pictures with such a loss were not moved.")


def _inside(move: Tensor, denoise_mask: Tensor | None) -> Tensor:
    return move if denoise_mask is None else move * denoise_mask.to(move.dtype)


@contextlib.contextmanager
def _heads_on(targets: tuple[Target, ...], device: torch.device) -> Iterator[None]:
    """The heads' weights on the model's device for the time of a run."""
    networks = {id(target.head): target.head.network for target in targets}.values()
    with torch.inference_mode(False):
        homes = [next(network.parameters()).device for network in networks]
        for network in networks:
            network.to(device)
    try:
        yield
    finally:
        with torch.inference_mode(False):
            for network, home in zip(networks, homes, strict=True):
                network.to(home)


@contextlib.contextmanager
def _random_state_kept(device: torch.device) -> Iterator[None]:
    """Leaves the global random state as it was: samplers that draw from it give source and guided run the same noise."""
    backend = getattr(torch, device.type, None)
    extra = backend.get_rng_state() if device.type in ("cuda", "mps", "xpu") and backend is not None else None
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)
        if extra is not None and backend is not None:
            backend.set_rng_state(extra)


@contextlib.contextmanager
def _cfg(guider: Any, cfg: float) -> Iterator[None]:
    """The guider at another cfg; below 0 its own."""
    own = guider.cfg
    try:
        if cfg >= 0:
            guider.cfg = cfg
        yield
    finally:
        guider.cfg = own
