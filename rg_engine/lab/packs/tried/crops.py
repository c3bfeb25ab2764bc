"""Tiles, crops and regions: TiledDiffusion, UltimateSDUpscale, Impact Pack."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..bench import CFG, PROMPT, SEED, STEPS, Bench, Guide, following_crops
from ..loading import node
from ..trial import Combination

#: A second pass changes a pose only where it starts early, and its target goes on.
DENOISE, LATE = 0.8, 0.9
METHODS = ("MultiDiffusion", "Mixture of Diffusers", "SpotDiffusion")


def tiled_diffusion() -> tuple[Combination, ...]:
    def tiled(method: str, tried: str, unit: Any = "readout", **more: Any) -> Combination:
        return Combination(nodes=method, tried=tried, unit=unit, run=functools.partial(_tiled, method=method, **more))

    return (
        *(tiled(method, "32 cells in tiles of 16, guided last") for method in METHODS),
        *(tiled(method, "32 cells in tiles of 16, guided first", first=True) for method in METHODS),
        *(tiled(method, "guided at 16 cells, then 32 in tiles, denoise 0.5", "px", enlarged=True) for method in METHODS),
        *(tiled(method, "16 cells in tiles of 12", "px", cells=16, tile=96) for method in METHODS),
        tiled(METHODS[1], "32 cells in tiles of 16, one picture", only=0),
    )


def _tiled(
    bench: Bench, guide: Guide, method: str, first: bool = False, enlarged: bool = False, cells: int = 32, tile: int = 128,
    only: int | None = None,
) -> Tensor:  # fmt: skip
    target = bench.target(only, end_percent=LATE if enlarged else 0.5)
    inputs = {"method": method, "tile_width": tile, "tile_height": tile, "tile_overlap": 64 if tile == 128 else 32}
    if first:
        model = node("TiledDiffusion", model=guide(bench.model, target), **inputs)
    else:
        model = guide(node("TiledDiffusion", model=bench.model, **inputs), target)
    if enlarged:
        small = {"samples": bench.ksampler(guide(bench.model))}
        large = node("LatentUpscale", samples=small, upscale_method="bilinear", width=256, height=256)
        return bench.ksampler(model, latent_image=large, denoise=0.5, seed=SEED + 1)
    return bench.ksampler(model, latent_image=bench.latent(None if only is None else 1, cells))


def ultimate_upscale() -> tuple[Combination, ...]:
    return (
        Combination(nodes="UltimateSDUpscaleNoUpscale", tried="128 px in one tile, denoise 0.8",
                    run=functools.partial(_upscaled, size=128)),
        Combination(nodes="UltimateSDUpscaleNoUpscale", tried="128 px in one tile, denoise 1",
                    run=functools.partial(_upscaled, size=128, denoise=1.0)),
        Combination(nodes="UltimateSDUpscaleNoUpscale", tried="enlarged to 256 px, tiles of 128, denoise 1", unit="readout",
                    run=functools.partial(_upscaled, size=256, denoise=1.0)),
        Combination(nodes="UltimateSDUpscaleNoUpscale", tried="enlarged to 256 px, tiles of 128, denoise 0.8",
                    run=functools.partial(_upscaled, size=256)),
        Combination(nodes="UltimateSDUpscaleNoUpscale", tried="guided at 128 px, enlarged to 256, tiles of 128, denoise 0.5",
                    run=functools.partial(_upscaled, size=256, denoise=0.5, guided_before=True)),
        Combination(nodes="UltimateSDUpscaleNoUpscale", tried="enlarged to 192 px, tiles of 128, Chess, half-tile seams",
                    run=functools.partial(_upscaled, size=192, mode_type="Chess", seam_fix_mode="Half Tile")),
    )  # fmt: skip


def _upscaled(
    bench: Bench, guide: Guide, size: int, denoise: float = DENOISE, guided_before: bool = False, **inputs: Any
) -> Tensor:
    """Pictures in other poses, or in these, enlarged and painted anew tile by tile."""
    before = bench.decode(bench.ksampler(guide(bench.model) if guided_before else bench.model))
    large = before.movedim(-1, 1)
    large = torch.nn.functional.interpolate(large, (size, size), mode="bilinear").clamp(0, 1).movedim(1, -1)
    positive = following_crops(bench.positive, large)
    given = {"seed": SEED + 1, "steps": STEPS, "cfg": CFG, "sampler_name": "euler", "scheduler": "normal",
             "denoise": denoise, "mode_type": "Linear", "tile_width": 128, "tile_height": 128, "mask_blur": 4,
             "tile_padding": 16, "seam_fix_mode": "None", "seam_fix_denoise": 0.5, "seam_fix_width": 32,
             "positive": positive, "negative": bench.negative, "vae": bench.world.vae}  # fmt: skip
    made = [
        node(
            "UltimateSDUpscaleNoUpscale", upscaled_image=large[k : k + 1],
            model=guide(bench.model, bench.target(k, end_percent=LATE if denoise < 1 else 0.5)), **{**given, **inputs},
        )
        for k in range(bench.pictures)
    ]  # fmt: skip
    return torch.cat(made).float()


def impact() -> tuple[Combination, ...]:
    detailed = [
        Combination(nodes="MaskToSEGS, DetailerForEach", tried=f"{tried}, denoise 0.8",
                    run=functools.partial(_detailed, box=box, **more))
        for tried, box, more in (
            ("the whole picture", (0, 0, 128, 128), {}),
            ("a box of 112 px enlarged to 128", (8, 16, 120, 128), {}),
            ("a box of 96 px enlarged to 128", (16, 24, 112, 120), {}),
            ("80 px of a box of 96, inpainting", (24, 32, 104, 112), {"noise_mask": True, "crop_factor": 1.2}),
            ("a box of 96 px, two cycles", (16, 24, 112, 120), {"cycle": 2}),
        )
    ]  # fmt: skip
    detailed += [
        Combination(nodes="MaskToSEGS, DetailerForEach", tried=f"{tried}, denoise 1",
                    run=functools.partial(_detailed, box=box, denoise=1.0))
        for tried, box in (
            ("the whole picture", (0, 0, 128, 128)),
            ("a box of 112 px enlarged to 128", (8, 16, 120, 128)),
            ("a box of 96 px enlarged to 128", (16, 24, 112, 120)),
        )
    ]  # fmt: skip
    return (
        *detailed,
        Combination(nodes="ToDetailerPipe, DetailerForEachPipe", tried="a box of 96 px, denoise 0.8",
                    run=functools.partial(_detailed, box=(16, 24, 112, 120), pipe=True)),
        Combination(nodes="ToBasicPipe, ImpactKSamplerBasicPipe", tried="euler", run=_basic_pipe, same=True),
        Combination(nodes="ImpactKSamplerAdvancedBasicPipe", tried="in two parts, at step 5", run=_advanced_pipe),
        Combination(nodes="KSamplerProvider, TwoSamplersForMask", tried="both guided", run=_two_samplers),
        Combination(nodes="KSamplerAdvancedProvider, RegionalSampler", tried="two halves, all guided", run=_regional),
        Combination(nodes="PixelKSampleUpscalerProvider, IterativeImageUpscale", tried="128 to 256 px in 2 steps",
                    run=_iterative),
    )  # fmt: skip


SAMPLING = {"seed": SEED, "steps": STEPS, "cfg": CFG, "sampler_name": "euler", "scheduler": "normal"}


def _detailed(
    bench: Bench, guide: Guide, box: tuple[int, int, int, int], pipe: bool = False, noise_mask: bool = False, cycle: int = 1,
    crop_factor: float = 1.0, denoise: float = DENOISE,
) -> Tensor:  # fmt: skip
    """Pictures in other poses, of which a box (left, top, right, bottom) is cut out, enlarged and painted anew."""
    before = bench.decode(bench.ksampler(bench.model))
    left, top, right, bottom = box
    mask = torch.zeros(1, 128, 128)
    mask[:, top:bottom, left:right] = 1
    segs = node("MaskToSEGS", mask=mask, combined=False, crop_factor=crop_factor, bbox_fill=False, drop_size=1)
    positive = following_crops(bench.positive, before)
    given = {**SAMPLING, "seed": SEED + 1, "guide_size": 128.0, "guide_size_for": False, "max_size": 128.0,
             "denoise": denoise, "feather": 0, "noise_mask": noise_mask, "force_inpaint": True, "wildcard": "",
             "cycle": cycle, "noise_mask_feather": 0}  # fmt: skip
    made = []
    for k in range(bench.pictures):
        model = guide(bench.model, bench.target(k, end_percent=LATE if denoise < 1 else 0.5))
        parts = {"model": model, "clip": bench.world.clip, "vae": bench.world.vae, "positive": positive,
                 "negative": bench.negative}  # fmt: skip
        if pipe:
            basic = node("ToBasicPipe", **parts)
            out = node("DetailerForEachPipe", image=before[k : k + 1], segs=segs, basic_pipe=basic, **given)
        else:
            out = node("DetailerForEach", image=before[k : k + 1], segs=segs, **parts, **given)
        made.append(out[0] if isinstance(out, tuple) else out)
    return torch.cat(made).float()


def _pipe(bench: Bench, model: Any, positive: Any = None) -> Any:
    return node("ToBasicPipe", model=model, clip=bench.world.clip, vae=bench.world.vae,
                positive=positive or bench.positive, negative=bench.negative)  # fmt: skip


def _basic_pipe(bench: Bench, guide: Guide) -> Tensor:
    pipe = _pipe(bench, guide(bench.model))
    _, latent, _ = node("ImpactKSamplerBasicPipe", basic_pipe=pipe, latent_image=bench.latent(), denoise=1.0, **SAMPLING)
    return latent["samples"]


def _advanced_pipe(bench: Bench, guide: Guide) -> Tensor:
    pipe = _pipe(bench, guide(bench.model))
    given = {key: value for key, value in SAMPLING.items() if key != "seed"} | {"noise_seed": SEED, "basic_pipe": pipe}
    first = node("ImpactKSamplerAdvancedBasicPipe", latent_image=bench.latent(), add_noise=True, start_at_step=0,
                 end_at_step=5, return_with_leftover_noise=True, **given)[1]  # fmt: skip
    return node("ImpactKSamplerAdvancedBasicPipe", latent_image=first, add_noise=False, start_at_step=5, end_at_step=1000,
                return_with_leftover_noise=False, **given)[1]["samples"]  # fmt: skip


def _half() -> Tensor:
    mask = torch.zeros(1, 128, 128)
    mask[:, :, :64] = 1
    return mask


def _two_samplers(bench: Bench, guide: Guide) -> Tensor:
    model = guide(bench.model)
    base = node("KSamplerProvider", **SAMPLING, denoise=1.0, basic_pipe=_pipe(bench, model))
    other = node("KSamplerProvider", **SAMPLING, denoise=1.0, basic_pipe=_pipe(bench, model, bench.prompt("a red figure")))
    given = {"base_sampler": base, "mask_sampler": other, "mask": _half()}
    return node("TwoSamplersForMask", latent_image=bench.latent(), **given)["samples"]


def _regional(bench: Bench, guide: Guide) -> Tensor:
    def provider(text: str) -> Any:
        given = {key: SAMPLING[key] for key in ("cfg", "sampler_name", "scheduler")}
        pipe = _pipe(bench, guide(bench.model), bench.prompt(text))
        return node("KSamplerAdvancedProvider", **given, sigma_factor=1.0, basic_pipe=pipe)

    left = node("RegionalPrompt", mask=_half(), advanced_sampler=provider(PROMPT))
    right = node("RegionalPrompt", mask=1 - _half(), advanced_sampler=provider("a red figure, grey wall"))
    return node(
        "RegionalSampler", seed=SEED, seed_2nd=0, seed_2nd_mode="ignore", steps=STEPS, base_only_steps=2, denoise=1.0,
        samples=bench.latent(), base_sampler=provider(PROMPT), overlap_factor=10, restore_latent=True,
        regional_prompts=node("CombineRegionalPrompts", regional_prompts1=left, regional_prompts2=right),
        additional_mode="DISABLE", additional_sampler="AUTO", additional_sigma_ratio=0.3,
    )["samples"]  # fmt: skip


def _iterative(bench: Bench, guide: Guide) -> Tensor:
    before = bench.decode(bench.ksampler(guide(bench.model)))
    positive, made = following_crops(bench.positive, before), []
    for k in range(bench.pictures):
        model = guide(bench.model, bench.target(k, end_percent=LATE))
        upscaler = node(
            "PixelKSampleUpscalerProvider", scale_method="bilinear", model=model, vae=bench.world.vae, positive=positive,
            negative=bench.negative, denoise=0.5, **SAMPLING,
        )  # fmt: skip
        out = node("IterativeImageUpscale", pixels=before[k : k + 1], upscale_factor=2.0, steps=2, temp_prefix="",
                   upscaler=upscaler, vae=bench.world.vae, step_mode="simple")  # fmt: skip
        made.append(out[0] if isinstance(out, tuple) else out)
    return torch.cat(made).float()
