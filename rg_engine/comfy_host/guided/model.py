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

import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...features import Backbone
from ...guidance import GuidanceSettings, Objective, Target, chain, make_plan
from ...guidance.schedule import DRAG_INTERVAL, LOOK_INTERVAL
from ..loaded.gradient_scope import Graph
from ..loaded.memory import GraphSize, choose_graph, with_room_for_graph
from ..loaded.model import backbone_of, check_fits, heads_on
from ..loaded.random_state import random_state_kept
from .progress import RunProgress
from .sampler_steps import SamplerSteps, watched
from .source_pass import SourcePasses, fingerprint
from .step import KEY, ModelCall, Options, Run, one_pass_step, reference_step, source_step

log = logging.getLogger("readout_guidance")
#: The source passes of this session.
SOURCES = SourcePasses()


def guide(model: Any, target: Target | None, settings: GuidanceSettings, graph: Graph | None = None) -> Any:
    """A clone of ``model`` (a ModelPatcher) that is guided by ``target`` whenever it is sampled.

    ``graph`` is what is kept for backward; None: what there is memory for.

    Raises BackboneError if the model can't be tapped or a head doesn't fit it.
    """
    targets = chain(target)
    guided = model.clone()
    if not targets or settings.strength == 0:
        return guided
    backbone = backbone_of(model)
    for each in targets:
        check_fits(each.head, backbone)
    guidance = ModelGuidance(targets, settings, backbone, graph)
    for kind, wrapper in (
        (WrappersMP.OUTER_SAMPLE, guidance.outer_sample),
        (WrappersMP.PREPARE_SAMPLING, guidance.prepare_sampling),
        (WrappersMP.SAMPLER_SAMPLE, guidance.sampler_sample),
        (WrappersMP.PREDICT_NOISE, guidance.predict_noise),
    ):
        guided.add_wrapper_with_key(kind, KEY, wrapper)
    return guided


class ModelGuidance:
    """The wrappers of one guided clone. What a run needs lives in ``_run`` and goes with it."""

    def __init__(
        self, targets: tuple[Target, ...], settings: GuidanceSettings, backbone: Backbone, graph: Graph | None = None
    ) -> None:
        self.targets = targets
        self.graph = graph
        self.settings = settings
        self.backbone = backbone
        self.losses: list[Tensor] = []  # of the last run, each branch's (B,), in call order
        self._run: Run | None = None

    def outer_sample(
        self, executor: Any, noise: Tensor, latent_image: Tensor, sampler: Any, sigmas: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        model_sampling = executor.class_obj.model_patcher.get_model_object("model_sampling")
        for target in self.targets:
            target.check_batch(noise.shape[0])
        schedule = [float(s) for s in sigmas]
        ranges = [(target.start_percent, target.end_percent) for target in self.targets]
        longest = [DRAG_INTERVAL for target in self.targets if target.drags]
        longest += [LOOK_INTERVAL for target in self.targets if target.needs_reference]
        settings = dataclasses.replace(self.settings, interval=min(self.settings.interval, *longest, 1.0))
        plan = make_plan(ranges, schedule, settings, lambda p: float(model_sampling.percent_to_sigma(p)))
        if not plan.steps:
            return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        self._run = run = Run(settings=settings, backbone=self.backbone, plan=plan, sampler=sampler, sigmas=schedule)
        try:
            out = executor(noise, latent_image, watched(sampler, lambda: run.steps), sigmas, *args, **kwargs)
        finally:
            self._run = None
        self._report(run)
        return out

    def prepare_sampling(self, executor: Any, model: Any, noise_shape: Any, *args: Any, **kwargs: Any) -> Any:
        if self._run is not None:
            heads, branches = tuple(target.head for target in self.targets), 2 if self.settings.mode == "reference" else 1
            size = GraphSize(backbone=self.backbone, heads=heads, branches=branches)
            self._run.graph = self.graph or choose_graph(model, size, noise_shape)
            noise_shape = with_room_for_graph(model, size, noise_shape, self._run.graph)
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
        with heads_on([target.head for target in self.targets], noise.device):
            with torch.inference_mode(False):
                size = (noise.shape[-2], noise.shape[-1])
                objective = Objective(self.targets, size, noise.shape[0], noise.device)
            run.begin(guider, objective, noise, denoise_mask, extra_args.get("seed"))
            kept, mark = None, None
            if objective.needs_source:
                sampling = (noise, latent_image, denoise_mask, run.sigmas, extra_args)
                with _cfg(guider, self.settings.source_cfg):
                    mark = fingerprint(guider, run.sampler, sampling, self._readouts_wanted(run))
                kept = SOURCES.find(mark)
            passes = 2 if mark is not None and kept is None else 1

            progress = RunProgress(run, guider.model_patcher)

            def sample(number: int) -> Tensor:
                run.steps = steps = SamplerSteps(run.plan, run.sampler, run.sigmas)

                def report(step: int, x0: Tensor, x: Tensor, total: int) -> None:
                    steps.finished_step()
                    if callback is not None:
                        callback(number * total + step, x0, x, passes * total)
                        progress.step(step, number * total + step + 1, passes * total, x0)

                return executor(guider, sigmas, dict(extra_args), report, noise, latent_image, denoise_mask, disable_pbar)

            if kept is not None:
                run.source = kept
            elif mark is not None:
                run.recording = True
                # Samplers that draw from the global state give source and guided run the same noise.
                with random_state_kept(noise.device), _cfg(guider, self.settings.source_cfg):
                    sample(0)
                run.recording = False
                SOURCES.keep(mark, run.source)
            return sample(passes - 1)

    def _readouts_wanted(self, run: Run) -> Any:
        """What a source pass keeps: at which steps and branches, and which heads' readouts."""
        heads = [(i, target.head) for i, target in enumerate(self.targets) if target.needs_source]
        return [planned.step for planned in run.plan.steps], self.settings.mode == "reference", heads

    def predict_noise(
        self, executor: Any, x: Tensor, timestep: Tensor, model_options: Options | None = None, seed: int | None = None
    ) -> Tensor:
        run, options = self._run, model_options or {}

        def predict(options: Options) -> Tensor:
            return executor(x, timestep, options, seed)

        planned = run.steps.planned(timestep.flatten()[0]) if run is not None and run.steps is not None else None
        if run is None or planned is None:
            return predict(options)
        step = source_step if run.recording else reference_step if run.settings.mode == "reference" else one_pass_step
        call = ModelCall(guider=executor.class_obj, x=x, timestep=timestep, options=options, predict=predict)
        return step(run, planned, call)

    def _report(self, run: Run) -> None:
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
