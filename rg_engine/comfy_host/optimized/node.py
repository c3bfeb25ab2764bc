"""What the Optimize Noise node does: checks, the run, and what comes out of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...errors import OptimizationError
from ...guidance import Target, chain
from ...optimization import PictureLoss, UpdateSettings
from ..edits.inversion import INVERTED, Inverted, inversion_of
from ..guided.report import say
from ..loaded.gradient_scope import Graph
from ..loaded.memory import GraphSize, choose_graph, with_room_for_graph
from ..loaded.model import known_backbone, tapped_for
from .checks import check_inputs, check_inversion, check_latent
from .history import History
from .measured.decoding import Decoder
from .network import KEY
from .optimizer import Job, Optimization, Seen
from .samplers import check_sampler
from .trajectory import Noises


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimized:
    """What a run gives. latent: the best finished LATENT; noise: a LATENT that it comes from; history: IMAGE, a picture an
    update; losses: one a picture, the mean over the batch; best: the lowest of each row, (B,); plot: IMAGE."""

    latent: dict[str, Any]
    noise: dict[str, Any]
    history: Tensor
    losses: list[float]
    plot: Tensor
    best: Tensor


def optimize_noise(
    model: Any, vae: Any, loss: PictureLoss | None, target: Target | None, settings: UpdateSettings, *, updates: int,
    coupled: bool, seed: int, steps: int, cfg: float, sampler_name: str, scheduler: str, positive: Any, negative: Any,
    latent: dict[str, Any], denoise: float, noises: Noises = "first", watch: Callable[[Seen], None] = lambda seen: None,
) -> Optimized:  # fmt: skip
    """Sample as KSampler does, again and again, and move the noise so that the loss of the finished picture falls.

    With 0 updates, or strength 0, the picture is KSampler's. An inverted latent (Invert Latent) is what sampling begins
    from: no noise is added. An interrupt keeps the best picture so far. ``watch`` is told of each picture. Raises
    OptimizationError, or TargetError, for what can't be optimized.
    """
    check_sampler(sampler_name, coupled)
    inverted = inversion_of(latent)
    targets = tuple(each for each in chain(target) if each.weight > 0)
    samples = comfy.sample.fix_empty_latent_channels(model, latent["samples"])
    check_inputs(model, vae, loss, targets, samples)
    check_latent("noise_mask" in latent, inverted is not None, denoise, coupled, noises == "all")
    noise = torch.zeros_like(samples, device="cpu")
    if inverted is None:
        noise = comfy.sample.prepare_noise(samples, seed, latent.get("batch_index"))
    if steps < 1 or updates < 0:
        raise OptimizationError(f"steps {steps} and updates {updates} make no picture: give at least 1 step and 0 updates")
    sampler = comfy.samplers.KSampler(
        model, steps=steps, device=model.load_device, sampler=sampler_name, scheduler=scheduler, denoise=denoise,
        model_options=model.model_options,
    )  # fmt: skip
    if len(sampler.sigmas) < 2:
        raise OptimizationError(f"with steps {steps} and denoise {denoise:g} nothing is sampled: raise them")
    if inverted is not None:
        check_inversion(inverted, float(sampler.sigmas[0]), steps, scheduler, cfg)
    backbone = tapped_for(model, [each.head for each in targets]) if targets else None
    for each in targets:
        each.check_batch(len(samples))
    room = _Room(model)
    if noises == "all":  # each goes its own way
        settings = dataclasses.replace(settings, tied=False)
    if settings.strength == 0:
        updates = 0
    job = Job(
        settings=settings, updates=updates, decoder=Decoder(vae), loss=loss, targets=targets, backbone=backbone,
        sampler_name=sampler_name, coupled=coupled, inverted=inverted is not None, noises=noises, seed=seed,
        graph=room.graph_for(samples.shape), memory=room.bytes(samples.shape),
    )  # fmt: skip
    history = History(updates, len(sampler.sigmas) - 1)

    def report(seen: Seen) -> None:
        history.add(seen)
        watch(seen)

    run = Optimization(job, report, history.tick)
    guider = comfy.samplers.CFGGuider(room.model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    done = guider.sample(
        noise, samples, run, sampler.sigmas, denoise_mask=latent.get("noise_mask"), disable_pbar=True, seed=seed
    )
    _report(run, history, updates)
    home = comfy.model_management.intermediate_device()
    rest = {key: value for key, value in latent.items() if key != INVERTED}
    begins = {**rest, "samples": run.first_latent().to(home)}
    if denoise >= 1.0 and "noise_mask" not in latent:
        begins[INVERTED] = Inverted(
            sigma=float(sampler.sigmas[0]), steps=steps, scheduler=scheduler, cfg=cfg,
            rms=float(begins["samples"].square().mean().sqrt()), error=0.0,
        )  # fmt: skip
    return Optimized(
        latent={**rest, "samples": done.to(home)}, noise=begins, history=history.pictures(), losses=history.losses,
        plot=history.plot(), best=history.best,
    )  # fmt: skip


class _Room:
    """A clone of the model that asks for room for the graph when it is loaded; ``model``."""

    def __init__(self, model: Any) -> None:
        self.model = model.clone()
        self._size: GraphSize | None = None
        self._graph: Graph = "full"

    def graph_for(self, shape: Any) -> Graph:
        """What is kept for backward: of one model call at a time, with both prompts. full for networks of unknown size,
        which change to light where memory runs out."""
        backbone = known_backbone(self.model.get_model_object("diffusion_model"))
        if backbone is None:
            return self._graph
        if backbone.is_transformer:  # the graph goes all the way
            backbone = backbone.at([backbone.blocks[-1]])
        self._size = GraphSize(backbone=backbone, heads=(), branches=2)
        self._graph = choose_graph(self.model, self._size, shape)
        self.model.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, KEY, self._prepare)
        return self._graph

    def bytes(self, shape: Any) -> float:
        """What sampling needs beside the weights, ComfyUI's estimate and the graph."""
        shape = shape if self._size is None else with_room_for_graph(self.model, self._size, shape, self._graph)
        return self.model.model.memory_required([2 * shape[0], *shape[1:]])

    def _prepare(self, executor: Any, model: Any, noise_shape: Any, *args: Any, **kwargs: Any) -> Any:
        assert self._size is not None
        return executor(model, with_room_for_graph(model, self._size, noise_shape, self._graph), *args, **kwargs)


def _report(run: Optimization, history: History, updates: int) -> None:
    losses, best = history.losses, float(history.best.mean())
    words = f"{len(losses)} pictures, loss {losses[0]:.4g}"
    if updates:
        words += f" -> {best:.4g}"
        before, after = run.noise
        words += f"; noise: rms {before['rms']:.3f} -> {after['rms']:.3f}, neighbours' correlation {after['neighbours']:.3f}"
    warnings = []
    if run.noises > 1 and updates:
        words += f"; all {run.noises} noises were optimized, and the output noise is the first alone: another picture"
    if run.interrupted:
        warnings.append(
            f"interrupted after {len(losses)} of {updates + 1} pictures: the best one goes on; interrupt again to stop what "
            "follows"
        )
    if run.stopped:
        warnings.append(f"stopped after {len(losses)} of {updates + 1} pictures: {run.stopped}")
    if updates and not run.interrupted and not best < losses[0]:
        warnings.append("no update made the picture better: lower strength, or take more updates")
    say(words, warnings)
