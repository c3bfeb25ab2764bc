"""Guided sampling through ComfyUI's own sampler node."""

from __future__ import annotations

import logging
from typing import Any

import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch

from ...errors import TargetError
from ...guidance import GuidanceSettings, Target
from ..edits.inversion import INVERTED, Inverted, inversion_of
from .model import guide

log = logging.getLogger("readout_guidance")
DETERMINISTIC = ("euler", "ddim")  # what retraces an inversion


def guided_ksampler(model: Any, target: Target | None, settings: GuidanceSettings, **ksampler: Any) -> dict[str, Any]:
    """ComfyUI's KSampler on the guided model; ``ksampler`` are its own inputs. Returns a LATENT.

    Drags of several frames give a batch, one picture a frame, all from the same noise. An inverted latent (Invert Latent)
    is what sampling begins from: no noise is added. Raises TargetError for frames of more than one latent, and settings
    that don't retrace an inversion.
    """
    from nodes import common_ksampler  # ComfyUI's

    inverted = inversion_of(ksampler["latent"])
    if inverted is not None:
        _check_inversion(model, inverted, **ksampler)
        common_ksampler = _from_inverted
    frames = 1 if target is None else target.drag_frames
    if target is None or frames == 1:
        return _plain(common_ksampler(guide(model, target, settings), **ksampler)[0])
    count = len(ksampler["latent"]["samples"])
    if count != 1:
        raise TargetError(
            f"drags in {frames} frames make a batch of their own: give a latent of one picture, not of {count}"
        )
    parts = [
        common_ksampler(guide(model, target.at_frame(number), settings), **ksampler)[0] for number in range(1, frames + 1)
    ]
    return _plain({**parts[0], "samples": torch.cat([part["samples"] for part in parts])})


def _from_inverted(
    model: Any, seed: int, steps: int, cfg: float, sampler_name: str, scheduler: str, positive: Any, negative: Any,
    latent: dict[str, Any], denoise: float,
) -> tuple[dict[str, Any]]:  # fmt: skip
    """ComfyUI's common_ksampler, beginning from the latent as it is.

    What a sampler begins from is ``noise_scaling(sigma, noise, latent)``, in which at a flow model's sigma of 1 nothing of a
    latent is left: the inverted latent is given as the noise that becomes it.
    """
    x = comfy.sample.fix_empty_latent_channels(model, latent["samples"])
    sampling = model.get_model_object("model_sampling")
    sigma = comfy.samplers.calculate_sigmas(sampling, scheduler, steps)[:1]
    one = torch.ones(1)
    noise, begin = torch.zeros_like(x), x
    if float(sampling.noise_scaling(sigma, 0 * one, one, True)) != 1:
        noise, begin = model.model.process_latent_in(x) / sampling.noise_scaling(sigma, one, 0 * one, True), noise
    samples = comfy.sample.sample(
        model, noise, steps, cfg, sampler_name, scheduler, positive, negative, begin, denoise=denoise,
        callback=latent_preview.prepare_callback(model, steps), disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED, seed=seed,
    )  # fmt: skip
    return ({**latent, "samples": samples},)


def guided_model(model: Any, target: Target | None, settings: GuidanceSettings) -> Any:
    """A MODEL that is guided wherever it is sampled. Raises TargetError for drags of several frames."""
    if target is not None and target.drag_frames > 1:
        raise TargetError(
            "drags in several frames need Readout-Guided KSampler: set frames of Drag Points to 1 for a guider, or a guided "
            "model"
        )
    return guide(model, target, settings)


def readout_guider(
    model: Any, positive: Any, negative: Any, cfg: float, target: Target | None, settings: GuidanceSettings
) -> comfy.samplers.CFGGuider:
    """A CFGGuider on the guided model, for SamplerCustomAdvanced. Raises TargetError as :func:`guided_model`."""
    guider = comfy.samplers.CFGGuider(guided_model(model, target, settings))
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    return guider


def _plain(latent: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in latent.items() if key != INVERTED}


def _check_inversion(
    model: Any,
    facts: Inverted,
    *,
    latent: dict[str, Any],
    steps: int,
    scheduler: str,
    sampler_name: str,
    cfg: float,
    denoise: float,
    **_: Any,
) -> None:
    if "noise_mask" in latent:
        raise TargetError(
            "the inverted latent has a noise mask, outside which its noise would stay as it is: remove the noise mask, and "
            "give Readout Target a mask of what may move instead"
        )
    sigma = float(comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), scheduler, steps)[0])
    if denoise < 1.0 or abs(sigma - facts.sigma) > 0.01 * facts.sigma:
        raise TargetError(
            f"the latent was inverted to noise level {facts.sigma:.4g} and sampling would begin at {sigma:.4g} with denoise "
            f"{denoise:g}: use steps {facts.steps}, scheduler {facts.scheduler}, denoise 1"
        )
    if sampler_name not in DETERMINISTIC or steps != facts.steps or scheduler != facts.scheduler or cfg != facts.cfg:
        log.warning(
            "Readout guidance: the latent was inverted for euler, %d steps, %s, cfg %g; other settings make another "
            "picture of it.",
            facts.steps, facts.scheduler, facts.cfg,
        )  # fmt: skip
