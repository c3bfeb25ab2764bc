"""ComfyUI's own samplers, schedules, passes and guiders."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
from torch import Tensor

from ....guidance import GuidanceSettings
from ..bench import CFG, SEED, STEPS, Bench, Guide
from ..loading import node
from ..trial import Combination

ZSNR_SAMPLERS = ("euler", "dpmpp_2m", "euler_ancestral", "dpmpp_2m_sde", "uni_pc")
ZSNR_SCHEDULERS = ("normal", "sgm_uniform", "karras")
LATER = 0.8  # the end_percent of targets where only four steps are made
LATE = 0.9  # the end_percent of targets that a second pass at half the noise still follows


def combinations() -> tuple[Combination, ...]:
    """After ComfyUI was started: its lists of samplers and schedules are read."""
    import comfy.samplers

    def plain(sampler: str = "euler", steps: int = STEPS, scheduler: str = "normal", **more: Any) -> Combination:
        tried = f"{sampler}, {scheduler}, {steps} steps"
        run = functools.partial(_ksampler, sampler_name=sampler, steps=steps, scheduler=scheduler)
        settings = more.get("settings")
        return Combination(nodes="KSampler", tried=f"{tried}{f', {settings.mode}' if settings else ''}", run=run, **more)

    modes = [GuidanceSettings(mode="reference", iterations=3), GuidanceSettings(mode="norm_ratio")]
    return (
        *(plain(sampler) for sampler in comfy.samplers.KSampler.SAMPLERS),
        *(plain(scheduler=scheduler) for scheduler in comfy.samplers.KSampler.SCHEDULERS if scheduler != "normal"),
        *(plain(steps=steps) for steps in (4, 6, 8, 11, 12, 14, 16, 30, 60)),
        *(plain(settings=settings) for settings in modes),
        _few_steps(),
        *(_zsnr(*each) for each in itertools.product(ZSNR_SAMPLERS, ZSNR_SCHEDULERS, (20, 4))),
        *(_zsnr(*each, 4, end_percent=LATER) for each in itertools.product(ZSNR_SAMPLERS, ZSNR_SCHEDULERS)),
        *(_zsnr("euler", "normal", STEPS, settings) for settings in modes),
        *PASSES,
        *GUIDERS,
        *SCHEDULES,
    )


def _ksampler(bench: Bench, guide: Guide, **inputs: Any) -> Tensor:
    return bench.ksampler(guide(bench.model), **inputs)


def _few_steps() -> Combination:
    def run(bench: Bench, guide: Guide) -> Tensor:
        return bench.ksampler(guide(bench.model, bench.target(end_percent=LATER)), steps=4)

    return Combination(nodes="KSampler", tried=f"euler, normal, 4 steps, guided to {LATER}", run=run)


def _zsnr(
    sampler: str, scheduler: str, steps: int, settings: GuidanceSettings | None = None, end_percent: float | None = None
) -> Combination:
    def run(bench: Bench, guide: Guide) -> Tensor:
        model = node("ModelSamplingDiscrete", model=bench.model, sampling="v_prediction", zsnr=True)
        target = None if end_percent is None else bench.target(end_percent=end_percent)
        return bench.ksampler(guide(model, target), sampler_name=sampler, scheduler=scheduler, steps=steps)

    tried = f"zsnr, {sampler}, {scheduler}, {steps} steps{', ' + settings.mode if settings else ''}"
    tried += f", guided to {end_percent}" if end_percent is not None else ""
    return Combination(nodes="ModelSamplingDiscrete", tried=tried, run=run, settings=settings or GuidanceSettings())


def _advanced(bench: Bench, model: Any, latent: Any, **inputs: Any) -> dict[str, Any]:
    given = {"noise_seed": SEED, "steps": STEPS, "cfg": CFG, "sampler_name": "euler", "scheduler": "normal",
             "positive": bench.positive, "negative": bench.negative}  # fmt: skip
    return node("KSamplerAdvanced", model=model, latent_image=latent, **{**given, **inputs})


def _whole(bench: Bench, guide: Guide) -> Tensor:
    return _advanced(bench, guide(bench.model), bench.latent())["samples"]


def _two_parts(bench: Bench, guide: Guide, at: int = 5, sampler: str = "euler") -> Tensor:
    """One guided model for both halves of a sampling."""
    advanced = functools.partial(_advanced, bench, guide(bench.model), sampler_name=sampler)
    first = advanced(bench.latent(), end_at_step=at, return_with_leftover_noise="enable")
    return advanced(first, start_at_step=at, add_noise="disable")["samples"]


def _second_part(bench: Bench, guide: Guide) -> Tensor:
    """The first steps unguided, the others guided."""
    first = _advanced(bench, bench.model, bench.latent(), end_at_step=4, return_with_leftover_noise="enable")
    return _advanced(bench, guide(bench.model), first, start_at_step=4, add_noise="disable")["samples"]


def _split_sigmas(bench: Bench, guide: Guide) -> Tensor:
    model = guide(bench.model)
    high, low = node("SplitSigmas", sigmas=bench.sigmas(model), step=5)
    guider = node("CFGGuider", model=model, positive=bench.positive, negative=bench.negative, cfg=CFG)
    latent = {"samples": bench.custom(guider, sigmas=high)}
    return bench.custom(guider, sigmas=low, latent_image=latent, noise=node("DisableNoise"))


def _sampler_custom(bench: Bench, guide: Guide) -> Tensor:
    model = guide(bench.model)
    return node(
        "SamplerCustom", model=model, add_noise=True, noise_seed=SEED, cfg=CFG, positive=bench.positive,
        negative=bench.negative, sampler=node("KSamplerSelect", sampler_name="euler"), sigmas=bench.sigmas(model),
        latent_image=bench.latent(),
    )[0]["samples"]  # fmt: skip


def _again(bench: Bench, guide: Guide, end: float, denoise: float = 0.6) -> Tensor:
    """A finished picture in another pose, sampled again."""
    latent = {"samples": bench.ksampler(bench.model)}
    model = guide(bench.model, bench.target(end_percent=end))
    return bench.ksampler(model, latent_image=latent, denoise=denoise, seed=SEED + 1)


def _hires(bench: Bench, guide: Guide, both: bool) -> Tensor:
    """A pass at 16x16, its latent enlarged, a second pass at 32x32; guided in both, or in the second only."""
    model = guide(bench.model, bench.target(end_percent=LATE))
    small = bench.ksampler(model if both else bench.model)
    large = node("LatentUpscale", samples={"samples": small}, upscale_method="bilinear", width=256, height=256)
    return bench.ksampler(model, latent_image=large, denoise=0.5, seed=SEED + 1)


def _mask(bench: Bench, guide: Guide) -> Tensor:
    """Inpainting with the figure's surroundings kept."""
    latent = {"samples": bench.ksampler(bench.model)}
    mask = torch.zeros(1, 128, 128)
    mask[:, 16:, 8:120] = 1
    return bench.ksampler(guide(bench.model), latent_image=node("SetLatentNoiseMask", samples=latent, mask=mask))


PASSES = (
    Combination(nodes="KSamplerAdvanced", tried="euler", run=_whole, same=True),
    Combination(nodes="KSamplerAdvanced, twice", tried="steps 0 to 5, then 5 to 20, one guided model", run=_two_parts),
    Combination(
        nodes="KSamplerAdvanced, twice", tried="dpmpp_2m, steps 0 to 3, then 3 to 20",
        run=functools.partial(_two_parts, at=3, sampler="dpmpp_2m"),
    ),
    Combination(nodes="KSamplerAdvanced, twice", tried="steps 0 to 4 unguided, then guided", run=_second_part),
    Combination(nodes="SplitSigmas, SamplerCustomAdvanced", tried="at step 5, one guided model", run=_split_sigmas),
    Combination(nodes="SamplerCustom", tried="euler", run=_sampler_custom, same=True),
    Combination(nodes="KSampler", tried="denoise 0.6, target to 0.9", run=functools.partial(_again, end=LATE)),
    Combination(nodes="KSampler", tried="denoise 0.8, target to 0.9",
                run=functools.partial(_again, end=LATE, denoise=0.8)),
    Combination(
        nodes="KSampler", tried="denoise 0.6, target to 0.3: nothing to guide",
        run=functools.partial(_again, end=0.3), nothing=True,
    ),
    Combination(nodes="LatentUpscale, KSampler", tried="16 to 32 cells, denoise 0.5, the second pass guided",
                run=functools.partial(_hires, both=False), unit="readout"),
    Combination(nodes="LatentUpscale, KSampler", tried="16 to 32 cells, denoise 0.5, both passes guided",
                run=functools.partial(_hires, both=True)),
    Combination(nodes="SetLatentNoiseMask", tried="all but a margin", run=_mask),
)  # fmt: skip


def _cfg_guider(bench: Bench, guide: Guide) -> Tensor:
    model = guide(bench.model)
    return bench.custom(node("CFGGuider", model=model, positive=bench.positive, negative=bench.negative, cfg=CFG))


def _basic_guider(bench: Bench, guide: Guide) -> Tensor:
    return bench.custom(node("BasicGuider", model=guide(bench.model), conditioning=bench.positive))


def _perp_neg(bench: Bench, guide: Guide) -> Tensor:
    return bench.custom(node(
        "PerpNegGuider", model=guide(bench.model), positive=bench.positive, negative=bench.prompt("a blue figure"),
        empty_conditioning=bench.negative, cfg=CFG,
    ))  # fmt: skip


def _dual(bench: Bench, guide: Guide, style: str) -> Tensor:
    return bench.custom(node(
        "DualCFGGuider", model=guide(bench.model), cond1=bench.positive, cond2=bench.prompt("a red figure"),
        negative=bench.negative, cfg_conds=CFG, cfg_cond2_negative=2.0, style=style,
    ))  # fmt: skip


GUIDERS = (
    Combination(nodes="CFGGuider", tried="euler", run=_cfg_guider, same=True),
    Combination(nodes="BasicGuider", tried="no negative prompt", run=_basic_guider),
    Combination(nodes="PerpNegGuider", tried="euler", run=_perp_neg),
    Combination(nodes="DualCFGGuider", tried="regular", run=functools.partial(_dual, style="regular")),
    Combination(nodes="DualCFGGuider", tried="nested", run=functools.partial(_dual, style="nested")),
)


def _scheduled(bench: Bench, guide: Guide, scheduler: str, sampler: str = "euler", **inputs: Any) -> Tensor:
    model = guide(bench.model)
    guider = node("CFGGuider", model=model, positive=bench.positive, negative=bench.negative, cfg=CFG)
    return bench.custom(guider, sampler, node(scheduler, **inputs))


SCHEDULES = tuple(
    Combination(nodes=name, tried=f"{sampler}, {inputs['steps']} steps",
                run=functools.partial(_scheduled, scheduler=name, sampler=sampler, **inputs))
    for name, inputs in (
        ("LaplaceScheduler", {"steps": 20}),
        ("AlignYourStepsScheduler", {"steps": 10, "model_type": "SD1"}),
        ("GITSScheduler", {"steps": 10}),
        ("ExponentialScheduler", {"steps": 20}),
        ("PolyexponentialScheduler", {"steps": 20}),
        ("VPScheduler", {"steps": 20}),
    )
    for sampler in ("euler", "dpmpp_2m")
)  # fmt: skip
