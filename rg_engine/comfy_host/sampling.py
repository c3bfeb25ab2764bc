"""Guided sampling through ComfyUI's own sampler node."""

from __future__ import annotations

from typing import Any

import comfy.samplers

from ..guidance import GuidanceSettings, Target
from .guided_model import guide


def guided_ksampler(model: Any, target: Target | None, settings: GuidanceSettings, **ksampler: Any) -> dict[str, Any]:
    """ComfyUI's KSampler on the guided model; ``ksampler`` are its own inputs. Returns a LATENT."""
    from nodes import common_ksampler  # ComfyUI's

    return common_ksampler(guide(model, target, settings), **ksampler)[0]


def readout_guider(
    model: Any, positive: Any, negative: Any, cfg: float, target: Target | None, settings: GuidanceSettings
) -> comfy.samplers.CFGGuider:
    """A CFGGuider on the guided model, for SamplerCustomAdvanced."""
    guider = comfy.samplers.CFGGuider(guide(model, target, settings))
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    return guider
