"""A guided sampling run, and one call of the model in it."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import comfy.model_patcher
import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from torch import Tensor

from ...features import Backbone
from ...guidance import GuidanceSettings, Objective, Plan, SourceStep, Target
from ...guidance.pictures import spread
from ...guidance.schedule import PlannedStep
from ...guidance.targets import fit
from ..loaded.gradient_scope import GradientScope, Graph
from ..loaded.model import input_scale
from .branches import KEY as READER
from .branches import PROMPTS, BranchReader
from .frame import Frame
from .sampler_steps import SamplerSteps
from .source_pass import SourcePass

Options = dict[str, Any]
KEPT = "readout_guidance_kept_prompt"
#: Functions of other nodes that come after the branches, and are not for passes that only read.
AFTER_BRANCHES = ("sampler_cfg_function", "sampler_pre_cfg_function", "sampler_post_cfg_function")


@dataclasses.dataclass(kw_only=True)
class Run:
    """The state of one sampling run."""

    targets: tuple[Target, ...]
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
    frame: Frame | None = None
    scope: GradientScope | None = None
    kept_prompt: KeptPrompt | None = None  # spares guided steps the negative prompt's pass
    recording: bool = False  # the source pass is under way
    source: SourcePass = dataclasses.field(default_factory=SourcePass)
    references: dict[int, Tensor] = dataclasses.field(default_factory=dict)  # latents in the model's scale, by target
    reference_steps: dict[tuple[int, int, int], SourceStep] = dataclasses.field(default_factory=dict)  # and by target
    losses: list[Tensor] = dataclasses.field(default_factory=list)  # (B,) each, in call order
    readouts: dict[int, Tensor] = dataclasses.field(default_factory=dict)  # the latest, by target
    seconds_added: float | None = None  # by guidance; None where no plain step tells
    guided: set[int] = dataclasses.field(default_factory=set)  # steps
    skipped: dict[str, int] = dataclasses.field(default_factory=dict)  # planned steps that could not be, by the reason

    def begin(self, guider: Any, objective: Objective, noise: Tensor, denoise_mask: Tensor | None, seed: int | None) -> None:
        """Set what is known once the model is loaded."""
        if not bool(noise.any()):  # the latent comes with its noise; references need some all the same
            generator = torch.Generator().manual_seed(seed or 0)
            noise = torch.randn(noise.shape, generator=generator).to(noise)
        self.objective, self.noise, self.denoise_mask = objective, noise, denoise_mask
        self.use_graph(self.graph, guider)
        for i, target in enumerate(objective.targets):
            if target.needs_reference and target.reference_latent is not None:
                latent = fit(target.reference_latent.to(noise), objective.size)
                self.references[i] = guider.inner_model.process_latent_in(spread(latent, noise)).expand_as(noise)

    def use_graph(self, graph: Graph, guider: Any) -> None:
        self.graph, self.scope = graph, GradientScope(guider.inner_model.diffusion_model, graph, self.backbone)

    def reader(self, x: Tensor, planned: PlannedStep, **settings: Any) -> BranchReader:
        assert self.objective is not None
        return BranchReader(
            self.backbone, self.objective, x, scope=self.scope, percent=planned.percent,
            feature_steps=self.settings.head_runs, **settings,
        )  # fmt: skip

    def move(self, move: Tensor) -> None:
        assert self.frame is not None
        self.frame.move(move)


@dataclasses.dataclass(frozen=True)
class ModelCall:
    """One call of the model by the sampler; ``predict(options, x)`` carries it out, with options and x that may differ from
    its own."""

    guider: Any
    x: Tensor
    timestep: Tensor
    options: Options
    predict: Callable[[Options, Tensor], Tensor]

    def plain(self) -> Tensor:
        """As the sampler asked for it."""
        return self.predict(self.options, self.x)

    def read(self, reader: BranchReader, branches: Sequence[int], x: Tensor | None = None) -> BranchReader:
        """Some branches by themselves, read out by ``reader``; nothing is made of their predictions.

        They run inside the guider's own prediction, where other nodes have set what they need; where one of them (a cache)
        answers in the model's place, by themselves.
        """
        x = self.x if x is None else x
        bare = {key: value for key, value in self.options.items() if key not in AFTER_BRANCHES}
        options = reader.install(without_readers(bare), self.guider, branches, only=True)
        self.predict(options, x)
        if not reader.called and self._asks(branches):
            conds = [self.guider.conds.get("positive"), self.guider.conds.get("negative")]
            comfy.samplers.calc_cond_batch(self.guider.inner_model, conds, x, self.timestep, options)
        return reader

    def _asks(self, branches: Sequence[int]) -> bool:
        """Whether a prompt of these branches is active now."""
        sigma = float(self.timestep.flatten()[0])
        conds = [cond for branch in branches for cond in self.guider.conds.get(PROMPTS[branch]) or ()]
        return any(
            cond.get("timestep_start", math.inf) >= sigma and cond.get("timestep_end", 0.0) <= sigma for cond in conds
        )

    @property
    def scale(self) -> Tensor:
        """z / x, (B, 1, 1, 1); all of these have x's axes."""
        return self.scale_at(self.timestep)

    def scale_at(self, sigma: Tensor | float) -> Tensor:
        """z / x at a noise level, (B, 1, 1, 1)."""
        sigma = sigma if isinstance(sigma, Tensor) else torch.full_like(self.timestep, sigma)
        return input_scale(self.guider.inner_model, sigma, self.x)

    def noise_at(self, sigma: float) -> Tensor:
        """The noise's share of z at a noise level, (B, 1, 1, 1) in 0..1."""
        return sigma * self.scale_at(sigma)


def without_readers(options: Options) -> Options:
    """Options without the readers of another guidance; the same object if there are none."""
    wrappers = options.get("transformer_options", {}).get("wrappers", {})
    kinds = [kind for kind in (WrappersMP.APPLY_MODEL, WrappersMP.CALC_COND_BATCH) if READER in wrappers.get(kind, {})]
    if not kinds:
        return options
    options = comfy.model_patcher.create_model_options_clone(options)
    for kind in kinds:
        wrappers = options["transformer_options"]["wrappers"]
        wrappers[kind] = {key: value for key, value in wrappers[kind].items() if key != READER}
    return options


class KeptPrompt:
    """Spares guided steps the negative prompt's pass, by what its prediction was before.

    Kept is what the prompts' predictions D differed in at the latest step that ran both, in units of its noise level:

        d = (D_positive - D_negative) / sigma        D_negative = D_positive - sigma' d    at a guided step at sigma'

    d is, but for its sign, the difference of the predicted noise, of a flow model that of the velocity. Only guiders that
    run two prompts, on the whole latent in one call, are served so; others run as they would.

    Args: most, guided steps in a row that go without the negative prompt; shape of the latent (B, C, H, W). left_out: of the
    run so far.
    """

    def __init__(self, most: int, shape: Sequence[int]) -> None:
        self._most = most
        self._shape = tuple(shape)
        self._difference: Tensor | None = None
        self._spared = 0  # guided steps since both prompts ran
        self.left_out = 0

    def install(self, options: Options, guided: bool) -> Options:
        """Model options for one prediction of the sampler: a guided one may be spared a prompt, others run and are noted."""
        options = comfy.model_patcher.create_model_options_clone(options)
        call = functools.partial(self._call, guided)
        add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEPT, call, options, is_model_options=True)
        return options

    def _call(
        self, guided: bool, calculate: Any, model: Any, conds: list, x: Tensor, timestep: Tensor, *args: Any
    ) -> list[Tensor]:  # fmt: skip
        """The wrapper around calc_cond_batch."""
        if len(conds) != 2 or not all(conds) or tuple(x.shape) != self._shape:
            return calculate(model, conds, x, timestep, *args)
        sigma = spread(timestep, x)
        if guided and self._difference is not None and self._spared < self._most:
            self._spared += 1
            self.left_out += 1
            positive, _ = calculate(model, [conds[0], None], x, timestep, *args)
            return [positive, positive - sigma * self._difference]
        positive, negative = calculate(model, conds, x, timestep, *args)
        self._difference, self._spared = (positive - negative) / sigma, 0
        return [positive, negative]
