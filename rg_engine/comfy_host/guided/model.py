"""Readout guidance on a ComfyUI model: a clone of its patcher with four wrappers, and nothing else.

Because the guidance travels with the model, every sampler node, guider and sampler of ComfyUI works with it as it is:

    OUTER_SAMPLE      looks whether steps are to be guided; without any, everything below stands aside
    PREPARE_SAMPLING  asks for the memory that the gradient's graph needs, before the model is loaded
    SAMPLER_SAMPLE    plans the guided steps; runs the source pass first, where a target needs it
    PREDICT_NOISE     the guided step

The sampler works in a frame (:mod:`.frame`), through which its moves reach it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...features import Backbone
from ...guidance import GuidanceSettings, Objective, Plan, Target, chain, make_plan
from ...guidance.crop_marks import crop_of
from ...guidance.schedule import DRAG_INTERVAL, LOOK_INTERVAL
from ...types import Region
from ..loaded.gradient_scope import Graph
from ..loaded.memory import GraphSize, choose_graph, tokens_beside, with_room_for_graph
from ..loaded.model import heads_on, tapped_for
from ..loaded.random_state import random_state_kept
from .attention import check_attention
from .frame import Frame, FramedModel, framed
from .progress import RunProgress
from .report import Repetitions, report_empty_plan, report_run, report_start
from .run import KeptPrompt, ModelCall, Options, Run
from .sampler_steps import SamplerSteps
from .source_pass import SourcePasses, fingerprint
from .step import KEY, one_pass_step, reference_step, source_step

#: The source passes of this session.
SOURCES = SourcePasses()
#: In transformer_options, while a source is recorded: other guidance of the model stands aside.
PLAIN = "readout_guidance_plain"


def guide(model: Any, target: Target | None, settings: GuidanceSettings, graph: Graph | None = None) -> Any:
    """A clone of ``model`` (a ModelPatcher) that is guided by ``target`` whenever it is sampled.

    A model that is guided already follows both: with the same settings as one chain of targets, with others each by itself,
    one after the other. ``graph`` is what is kept for backward; None: what there is memory for.

    Raises BackboneError if the model can't be tapped or a head doesn't fit it.
    """
    targets = chain(target)
    guided = model.clone()
    if not targets or settings.strength == 0:
        return guided
    for other in guidance_of(model):
        if other.settings == settings and other.graph == graph:
            targets = other.targets + targets
            _attach(guided, other, attach=False)
    backbone = tapped_for(model, [each.head for each in targets])
    check_attention(backbone)
    _attach(guided, ModelGuidance(targets, settings, backbone, graph))
    return guided


def guidance_of(model: Any) -> list[ModelGuidance]:
    """What guides a ModelPatcher, in the order in which it was applied."""
    return [wrapper.__self__ for wrapper in model.get_wrappers(WrappersMP.OUTER_SAMPLE, KEY)]


def _attach(model: Any, guidance: ModelGuidance, attach: bool = True) -> None:
    """Add a guidance's wrappers to a ModelPatcher, or take them off."""
    for kind, wrapper in guidance.wrappers.items():
        others = [each for each in model.get_wrappers(kind, KEY) if each.__self__ is not guidance]
        model.remove_wrappers_with_key(kind, KEY)
        for each in [*others, wrapper] if attach else others:
            model.add_wrapper_with_key(kind, KEY, each)


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
        self.wrappers = {
            WrappersMP.OUTER_SAMPLE: self.outer_sample,
            WrappersMP.PREPARE_SAMPLING: self.prepare_sampling,
            WrappersMP.SAMPLER_SAMPLE: self.sampler_sample,
            WrappersMP.PREDICT_NOISE: self.predict_noise,
        }
        self._run: Run | None = None
        self._repetitions = Repetitions()

    def outer_sample(
        self, executor: Any, noise: Tensor, latent_image: Tensor, sampler: Any, sigmas: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        guider = executor.class_obj
        for target in self.targets:
            target.check_batch(noise.shape[0])
        if self.settings.keyframes is not None:
            self.settings.keyframes.check_batch(noise.shape[0])
        region = crop_of(guider.conds.get("positive") or [])
        targets = self.targets if region is None else cropped(self.targets, region)
        if region is None:
            self._repetitions.look(latent_image)
        plan = self._plan(guider, targets, sigmas)
        sampling = guider.model_patcher.get_model_object("model_sampling")
        if not plan.steps:
            asked = self.targets if targets else ()
            report_empty_plan(asked, self.settings, [float(s) for s in sigmas], sampling.percent_to_sigma)
            return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        before, run = self._run, Run(
            targets=targets, settings=self.settings, backbone=self.backbone, plan=plan, sampler=sampler, sigmas=[]
        )  # fmt: skip
        self._run = run
        try:
            out = executor(
                noise, latent_image, framed(sampler, lambda: run.frame, float(sigmas[-1])), sigmas, *args, **kwargs
            )
        finally:
            self._run = before
        self.losses = run.losses
        report_run(run)
        return out

    def _plan(self, guider: Any, targets: tuple[Target, ...], sigmas: Tensor) -> Plan:
        sampling = guider.model_patcher.get_model_object("model_sampling")
        ranges = [(target.start_percent, target.end_percent) for target in targets]
        longest = [DRAG_INTERVAL for target in targets if target.drags]
        longest += [LOOK_INTERVAL for target in targets if target.needs_reference]
        return make_plan(
            ranges, [float(s) for s in sigmas], self.settings, lambda percent: float(sampling.percent_to_sigma(percent)),
            lambda i, percent: targets[i].counts_at(percent), min(longest, default=1.0),
        )  # fmt: skip

    def prepare_sampling(self, executor: Any, model: Any, noise_shape: Any, conds: Any, *args: Any, **kwargs: Any) -> Any:
        if self._run is not None:
            size = GraphSize(
                backbone=self.backbone, heads=tuple(target.head for target in self.targets),
                branches=2 if self.settings.mode == "reference" else 1, text=tokens_beside(conds, self.backbone),
                feature_maps=5 if self.settings.head_runs > 1 else 2,
            )  # fmt: skip
            self._run.graph = self.graph or choose_graph(model, size, noise_shape)
            noise_shape = with_room_for_graph(model, size, noise_shape, self._run.graph)
        return executor(model, noise_shape, conds, *args, **kwargs)

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
        options = extra_args.get("model_options", {})
        if run is None or options.get("transformer_options", {}).get(PLAIN):
            return executor(guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask, disable_pbar)
        run.sigmas, run.plan = [float(s) for s in sigmas], self._plan(guider, run.targets, sigmas)
        with heads_on([target.head for target in run.targets], noise.device):
            with torch.inference_mode(False):
                size = (noise.shape[-2], noise.shape[-1])
                objective = Objective(
                    run.targets, size, noise.shape[0], noise.device, taps=self.backbone.taps,
                    paper_drags=self.settings.mode == "reference",
                )  # fmt: skip
            run.begin(guider, objective, noise, denoise_mask, extra_args.get("seed"))
            report_start(run, noise.device)
            kept, mark = None, None
            if objective.needs_source:
                sampling = (noise, latent_image, denoise_mask, run.sigmas, extra_args)
                with _cfg(guider, self.settings.source_cfg):
                    mark = fingerprint(guider, run.sampler, sampling, self._readouts_wanted(run))
                kept = SOURCES.find(mark)
            passes = 2 if mark is not None and kept is None else 1
            progress = RunProgress(run, guider.model_patcher)

            def sample(number: int, more: Options) -> Tensor:
                """One pass, in a frame of its own."""
                run.steps = steps = SamplerSteps(run.plan, run.sigmas)
                run.frame = frame = Frame(noise.shape)
                # A source, which both prompts make, is compared with what both make.
                spared = 0 if run.objective is None or run.objective.needs_source else self.settings.spared
                run.kept_prompt = KeptPrompt(spared, noise.shape) if spared else None

                def report(step: int, x0: Tensor, x: Tensor, total: int) -> None:
                    steps.finished_step()
                    if callback is not None:
                        callback(number * total + step, x0, frame.of(x), passes * total)
                        progress.step(step, number * total + step + 1, passes * total, x0)

                asked = {**extra_args, "model_options": {**options, **more}} if more else dict(extra_args)
                if hasattr(run.sampler, "sampler_function"):
                    return executor(guider, sigmas, asked, report, noise, latent_image, denoise_mask, disable_pbar)
                model = FramedModel(guider, frame)
                out = executor(model, sigmas, asked, report, noise, latent_image, denoise_mask, disable_pbar)
                return frame.end(out, run.sigmas[-1])

            if kept is not None:
                run.source = kept
            elif mark is not None:
                run.recording = True
                plain = {**options.get("transformer_options", {}), PLAIN: True}
                # Samplers that draw from the global state give source and guided run the same noise.
                with random_state_kept(noise.device), _cfg(guider, self.settings.source_cfg):
                    sample(0, {"transformer_options": plain})
                run.recording = False
                SOURCES.keep(mark, run.source)
            try:
                return sample(passes - 1, {})
            finally:
                run.seconds_added = progress.seconds_added

    def _readouts_wanted(self, run: Run) -> Any:
        """What a source pass keeps: at which steps and branches, and which heads' readouts."""
        heads = [(i, target.head) for i, target in enumerate(run.targets) if target.needs_source]
        return [planned.step for planned in run.plan.steps], self.settings.mode == "reference", heads

    def predict_noise(
        self, executor: Any, x: Tensor, timestep: Tensor, model_options: Options | None = None, seed: int | None = None
    ) -> Tensor:
        run, options = self._run, model_options or {}

        def predict(options: Options, x: Tensor) -> Tensor:
            return executor(x, timestep, options, seed)

        ready = run is not None and run.steps is not None and run.noise is not None and x.shape == run.noise.shape
        planned = run.steps.planned(timestep.flatten()[0]) if ready and run is not None and run.steps is not None else None
        if run is None or planned is None:
            kept = None if run is None or not ready or run.recording else run.kept_prompt
            return predict(options if kept is None else kept.install(options, guided=False), x)
        step = source_step if run.recording else reference_step if run.settings.mode == "reference" else one_pass_step
        return step(run, planned, ModelCall(executor.class_obj, x, timestep, options, predict))


def cropped(targets: Sequence[Target], region: Region) -> tuple[Target, ...]:
    """The targets as they are for a crop of the picture, without those that have nothing to say of it."""
    found = (target.cropped(region) for target in targets)
    return tuple(target for target in found if target is not None)


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
