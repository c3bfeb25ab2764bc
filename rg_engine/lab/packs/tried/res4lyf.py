"""RES4LYF: the samplers that it adds to KSampler's list, and nodes of its own."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from ....guidance import GuidanceSettings
from ..bench import CFG, SEED, STEPS, Bench, Guide
from ..loading import node
from ..trial import Combination

#: Of ComfyUI, before any pack was loaded.
OWN_SAMPLERS: set[str] = set()
CLOWN = (("exponential/res_2m", 0.0), ("exponential/res_2m", 0.5), ("exponential/res_2s", 0.0), ("linear/euler", 0.0),
         ("multistep/deis_3m", 0.0), ("exponential/res_3s", 0.0))  # fmt: skip


def note_samplers() -> None:
    """Keep what KSampler lists now."""
    import comfy.samplers

    OWN_SAMPLERS.update(comfy.samplers.KSampler.SAMPLERS)


def combinations() -> tuple[Combination, ...]:
    import comfy.samplers

    added = [name for name in comfy.samplers.KSampler.SAMPLERS if name not in OWN_SAMPLERS]
    return (
        *(
            Combination(nodes=f"KSampler, {name}", tried=f"{scheduler}, 20 steps",
                        run=functools.partial(_ksampler, sampler_name=name, scheduler=scheduler))
            for name in added
            for scheduler in ("normal", "beta57")[: 2 if name in ("res_2m", "res_2s") else 1]
        ),
        *(
            Combination(nodes=f"KSampler, {name}", tried="normal, 20 steps, iterations 2",
                        settings=GuidanceSettings(iterations=2),
                        run=functools.partial(_ksampler, sampler_name=name, scheduler="normal"))
            for name in ("res_5s", "res_6s")
        ),
        *(
            Combination(nodes="ClownsharKSampler", tried=f"{name}, eta {eta:g}",
                        run=functools.partial(_clown, sampler_name=name, eta=eta))
            for name, eta in CLOWN
        ),
        Combination(nodes="ClownsharKSampler", tried="exponential/res_2m, without bongmath",
                    run=functools.partial(_clown, sampler_name="exponential/res_2m", eta=0.0, bongmath=False)),
        Combination(nodes="ClownOptions_Tile", tried="exponential/res_2m, 24 cells, tiles of 16", unit="readout",
                    run=functools.partial(_tiled)),
        Combination(nodes="ClownSampler, SamplerCustomAdvanced", tried="exponential/res_2m", run=_as_sampler),
    )  # fmt: skip


def _ksampler(bench: Bench, guide: Guide, **inputs: Any) -> Tensor:
    return bench.ksampler(guide(bench.model), **inputs)


def _clown(bench: Bench, guide: Guide, latent: Any = None, **inputs: Any) -> Tensor:
    given = {"scheduler": "normal", "steps": STEPS, "cfg": CFG, "seed": SEED, "positive": bench.positive,
             "negative": bench.negative, "latent_image": latent or bench.latent(), "denoise": 1.0,
             "sampler_mode": "standard", "bongmath": True}  # fmt: skip
    return node("ClownsharKSampler_Beta", model=guide(bench.model), **{**given, **inputs})[0]["samples"]


def _tiled(bench: Bench, guide: Guide) -> Tensor:
    options = node("ClownOptions_Tile_Beta", tile_width=128, tile_height=128)
    only = functools.partial(_first, bench, guide)
    return _clown(bench, only, bench.latent(1, cells=24), sampler_name="exponential/res_2m", eta=0.0,
                  options_group={"options0": options})  # fmt: skip


def _first(bench: Bench, guide: Guide, model: Any) -> Any:
    """Guided towards the first scene."""
    return guide(model, bench.target(only=0))


def _as_sampler(bench: Bench, guide: Guide) -> Tensor:
    sampler = node("ClownSampler_Beta", sampler_name="exponential/res_2m", eta=0.0, seed=SEED)
    model = guide(bench.model)
    guider = node("CFGGuider", model=model, positive=bench.positive, negative=bench.negative, cfg=CFG)
    return bench.custom(guider, sampler)
