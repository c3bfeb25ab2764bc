"""AnimateDiff-Evolved: evolved sampling of frames with a control each, windows over them, a small random motion module."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ...cost.models import randomise
from ..bench import STEPS, Bench, Guide
from ..loading import node, pack_module
from ..trial import Combination

PACK = "ComfyUI-AnimateDiff-Evolved"
CONTEXTS: dict[str, tuple[str, dict[str, Any]]] = {
    "standard static": ("ADE_StandardStaticContextOptions", {"context_length": 2, "context_overlap": 1}),
    "standard uniform": ("ADE_StandardUniformContextOptions", {"context_length": 2, "context_overlap": 1}),
    "looped uniform": ("ADE_LoopedUniformContextOptions", {"context_length": 2, "context_overlap": 1}),
    "batched": ("ADE_BatchedContextOptions", {"context_length": 2}),
}


def combinations() -> tuple[Combination, ...]:
    def evolved(tried: str, **more: Any) -> Combination:
        settings = {key: more.pop(key) for key in ("same",) if key in more}
        return Combination(nodes="ADE_UseEvolvedSampling", tried=tried, run=functools.partial(_evolved, **more), **settings)

    return (
        evolved("no motion module", same=True),
        evolved("no motion module, put on the guided model", first=True, same=True),
        *(evolved(f"no motion module, {name} windows of 2 frames", context=name, same=True) for name in CONTEXTS),
        evolved("no motion module, views of 2 frames", views=True, same=True),
        evolved("motion module", motion=True),
        *(evolved(f"motion module, {name} windows of 2 frames", context=name, motion=True) for name in CONTEXTS),
        evolved("motion module, standard static windows, put on the guided model", context="standard static",
                motion=True, first=True),
        evolved("motion module, views of 2 frames", views=True, motion=True),
        evolved("motion module, FreeNoise, standard static windows", context="standard static", motion=True,
                settings={"noise_type": "FreeNoise"}),
        evolved("motion module, FreeInit of 2 iterations", motion=True, free_init=True),
        evolved("motion module, standard static windows, euler_ancestral", context="standard static", motion=True,
                sampler="euler_ancestral"),
    )  # fmt: skip


def _evolved(
    bench: Bench, guide: Guide, context: str = "", views: bool = False, motion: bool = False, first: bool = False,
    settings: dict[str, Any] | None = None, free_init: bool = False, sampler: str = "euler",
) -> Tensor:  # fmt: skip
    """Each picture of the batch is a frame with a control of its own."""
    inputs: dict[str, Any] = {"beta_schedule": "use existing"}
    if motion:
        inputs["m_models"] = _motion(bench)
    if context:
        name, options = CONTEXTS[context]
        inputs["context_options"] = node(name, **options)
    if views:
        options = node("ADE_StandardStaticViewOptions", view_length=2, view_overlap=1)
        inputs["context_options"] = node("ADE_ViewsOnlyContextOptions", view_opts_req=options)
    if settings or free_init:
        given: dict[str, Any] = {"batch_offset": 0, "seed_gen": "comfy", "seed_offset": 0, **(settings or {})}
        if free_init:
            given["iteration_opts"] = node("ADE_IterationOptsFreeInit", iterations=2)
        inputs["sample_settings"] = node("ADE_AnimateDiffSamplingSettings", **given)
    if first:
        model = node("ADE_UseEvolvedSampling", model=guide(bench.model), **inputs)
    else:
        model = guide(node("ADE_UseEvolvedSampling", model=bench.model, **inputs))
    return bench.ksampler(model, sampler_name=sampler, steps=STEPS)


def _motion(bench: Bench) -> Any:
    """M_MODELS of one motion module of the demo model's widths, behind its output blocks, with small random weights."""
    assert bench.folder is not None
    parts = pack_module(bench.folder / PACK, "animatediff.motion_module_ad")
    injection = pack_module(bench.folder / PACK, "animatediff.model_injection")
    motion = pack_module(bench.folder / PACK, "animatediff.utils_model").ModelTypeSD
    info = parts.AnimateDiffInfo(motion.SD1_5, parts.AnimateDiffFormat.ANIMATEDIFF, parts.AnimateDiffVersion.V3, "random")
    shape = {"down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0.attention_blocks.1.pos_encoder.pe":
             torch.zeros(1, 24, 64)}  # fmt: skip
    model = parts.AnimateDiffModel(shape, info)
    model.down_blocks = None
    widths = [block[0].out_channels for block in bench.model.model.diffusion_model.output_blocks]
    blocks = []
    for first in range(0, len(widths), 3):
        block = parts.MotionModule(widths[first], block_type=parts.BlockType.UP, block_idx=first // 3, ops=model.ops)
        block.motion_modules = torch.nn.ModuleList(
            parts.get_motion_module(width, parts.BlockType.UP, first // 3, k, ("Temporal_Self", "Temporal_Self"), True, 24,
                                    model.ops)
            for k, width in enumerate(widths[first : first + 3])
        )  # fmt: skip
        blocks.append(block)
    model.up_blocks = torch.nn.ModuleList(blocks)
    randomise(model)
    for name, parameter in model.named_parameters():
        if "proj_out" in name:
            parameter.mul_(0.15)
    device = bench.model.load_device
    patcher = injection.create_MotionModelPatcher(model=model.to(device), load_device=device, offload_device=device)
    return node("ADE_ApplyAnimateDiffModelSimple", motion_model=patcher)
