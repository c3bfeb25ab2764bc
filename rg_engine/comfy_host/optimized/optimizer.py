"""The optimization itself, inside of one sampling run of ComfyUI's: picture after picture, and an update between them."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import comfy.model_management
import comfy.samplers
import torch
from torch import Tensor

from ...errors import OptimizationError
from ...features import Backbone
from ...guidance import Target
from ...guidance.pictures import spread
from ...optimization import PictureLoss, Updater, UpdateSettings, statistics
from ..loaded.frozen_layers import plain
from ..loaded.gradient_scope import Graph
from ..loaded.model import latent_out
from .measured.decoding import Decoder
from .measured.finished_readout import FinishedReadout
from .network import Network
from .trajectory import Noises, Trajectory

log = logging.getLogger("readout_guidance")
#: So many updates in a row without a usable gradient end the optimization.
PATIENCE = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be optimized. updates: 0 makes the picture and measures it. seed: of crops, and of the perturbation."""

    settings: UpdateSettings
    updates: int
    decoder: Decoder
    loss: PictureLoss | None
    targets: tuple[Target, ...] = ()
    backbone: Backbone | None = None
    sampler_name: str = "euler"
    coupled: bool = False
    inverted: bool = False
    noises: Noises = "first"
    seed: int = 0
    graph: Graph = "full"
    memory: float = 0.0  # bytes of a model call with a graph


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seen:
    """One picture of each row on the way: its place, losses (B,), images (B, 3, H, W) in -1..1, and whether it is the best
    so far."""

    update: int
    losses: Tensor
    images: Tensor
    best: Tensor


class Optimization(comfy.samplers.Sampler):
    """A 'sampler' whose result is the best finished latent. After it: interrupted; stopped, why it ended early; noise,
    statistics of the first latent before and after; noises, how many are optimized.

    report is told of each picture, tick of each step of the schedule (picture, step).
    """

    def __init__(self, job: Job, report: Callable[[Seen], None], tick: Callable[[int, int], None]) -> None:
        self._job, self._report, self._tick = job, report, tick
        self._first: Tensor | None = None
        self.interrupted = False
        self.stopped = ""
        self.noise: list[dict[str, float]] = []
        self.noises = 1
        self._made = 0

    def first_latent(self) -> Tensor:
        """What the best picture begins with, a latent (B, C, h, w) as ComfyUI hands them on."""
        assert self._first is not None
        return self._first

    def sample(
        self, model_wrap: Any, sigmas: Tensor, extra_args: dict, callback: Any, noise: Tensor, latent_image: Tensor,
        denoise_mask: Tensor | None = None, disable_pbar: bool = False,
    ) -> Tensor:  # fmt: skip
        job = self._job
        conds = model_wrap.conds
        with torch.inference_mode(False), torch.no_grad():
            model_wrap.conds = {name: plain(conds[name]) for name in conds}
            noise, latent_image, denoise_mask, sigmas = plain([noise, latent_image, denoise_mask, sigmas])
            try:
                return self._run(model_wrap, job, extra_args, noise, latent_image, denoise_mask, sigmas)
            finally:
                model_wrap.conds = conds

    def _run(
        self, guider: Any, job: Job, extra_args: dict, noise: Tensor, latent: Tensor, mask: Tensor | None, sigmas: Tensor
    ) -> Tensor:
        steps = len(sigmas) - 1
        network = Network(guider, extra_args["model_options"], job.graph, 2 * steps, job.memory)
        way = Trajectory(
            network, job.sampler_name, sigmas, extra_args, noise, latent_image=latent, denoise_mask=mask,
            coupled=job.coupled, inverted=job.inverted, noises=job.noises, tick=lambda step: self._tick(self._made, step),
        )  # fmt: skip
        readout = self._readout(network, extra_args["model_options"], noise) if job.targets else None
        u = way.start
        self.noises = len(u) if job.noises == "all" else 1
        updater, best, unusable = Updater(u, job.settings), _Best(), 0
        self.noise = [statistics(u[0])]
        try:
            for m in range(job.updates + 1):
                self._made = m
                gradient = self._picture(way, readout, u, m, best, guider)
                if gradient is None:
                    break
                unusable = 0 if bool(torch.isfinite(gradient).all()) else unusable + 1
                if unusable == 1:
                    log.warning("Optimize Noise: a gradient is not finite; that picture is not moved by it.")
                if unusable == PATIENCE:
                    self.stopped = f"the gradient was not finite {PATIENCE} times in a row"
                    break
                u = updater(u, gradient, self._perturbation(m, u if job.noises == "all" else u[0]))
        except comfy.model_management.InterruptProcessingException:
            if best.ends is None:
                raise
            self.interrupted = True
        assert best.ends is not None
        assert best.u is not None
        self._first = guider.inner_model.process_latent_out(way.first(best.u[0]))
        self.noise.append(statistics(best.u[0]))
        return best.ends

    def _picture(
        self, way: Trajectory, readout: FinishedReadout | None, u: Tensor, m: int, best: _Best, guider: Any
    ) -> Tensor | None:
        """Makes and measures picture ``m``; the gradient of its loss for the next update, None if there is none to come."""
        last = m == self._job.updates
        leaf = u.detach().clone().requires_grad_(not last)
        with torch.set_grad_enabled(not last):
            ends = way(leaf)  # (1 or 2, B, C, h, w)
            if not last and not ends.requires_grad:
                raise OptimizationError(
                    f"the sampler {self._job.sampler_name!r} gave no gradient in this ComfyUI: use euler, or another one"
                )
            measured = [self._measure(end, readout, m, guider) for end in ends]
            losses = torch.stack([each for each, _ in measured])  # (1 or 2, B)
            total = losses.sum()
        row = losses.detach().mean(0)
        taken = best.take(row, ends.detach()[0], u)
        self._report(Seen(update=m, losses=row.cpu(), images=measured[0][1].detach(), best=taken))
        if last:
            return None
        if not total.requires_grad:
            raise OptimizationError("the loss does not depend on the picture, so that nothing can be optimized")
        (gradient,) = torch.autograd.grad(total, leaf)
        if not bool(gradient.any()):
            raise OptimizationError(
                "the loss has no gradient here (it is 0 throughout): the picture may be what is asked for already, a mask "
                "may be black, or a score be past its end"
            )
        return gradient

    def _measure(self, end: Tensor, readout: FinishedReadout | None, m: int, guider: Any) -> tuple[Tensor, Tensor]:
        """The loss (B,) and the images of finished latents in the model's scale."""
        job = self._job
        images = job.decoder(latent_out(guider.inner_model, end))
        losses = images.new_zeros(len(images))
        if job.loss is not None:
            losses = losses + job.loss(images, torch.Generator().manual_seed((job.seed + m) % 2**63))
        if readout is not None:
            losses = losses + readout(end).to(losses)
        return losses, images

    def _readout(self, network: Network, options: dict[str, Any], noise: Tensor) -> FinishedReadout:
        assert self._job.backbone is not None
        generator = torch.Generator().manual_seed(self._job.seed % 2**63)
        drawn = torch.randn(noise.shape, generator=generator).to(noise)
        return FinishedReadout(network, options, self._job.targets, self._job.backbone, drawn)

    def _perturbation(self, m: int, like: Tensor) -> Tensor | None:
        if not self._job.settings.noise:
            return None
        generator = torch.Generator().manual_seed((self._job.seed + m + 1) % 2**63)
        return torch.randn(like.shape, generator=generator).to(like)


class _Best:
    """The best of each row so far: ends, finished latents; u (P, B, C, H, W), what they are of."""

    def __init__(self) -> None:
        self.ends: Tensor | None = None
        self.u: Tensor | None = None
        self._losses: Tensor | None = None

    def take(self, losses: Tensor, ends: Tensor, u: Tensor) -> Tensor:
        """Which rows (B,) these are the best of."""
        if self._losses is None or self.ends is None or self.u is None:
            self._losses, self.ends, self.u = losses, ends, u.detach()
            return torch.ones_like(losses, dtype=torch.bool).cpu()
        better = (losses < self._losses) | ~torch.isfinite(self._losses)
        self._losses = torch.where(better, losses, self._losses)
        self.ends = torch.where(spread(better, ends), ends, self.ends)
        self.u = torch.where(spread(better, u[0]), u.detach(), self.u)
        return better.cpu()
