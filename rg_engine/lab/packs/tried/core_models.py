"""ComfyUI's own nodes that patch a model or a prompt: CFG, attention, caches, windows, hooks, compilation."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..bench import SEED, Bench, Guide
from ..loading import has_node, node
from ..trial import Combination

#: A LoRA's layers: the last convolutions that every tap comes before.
LORA_LAYERS = ("output_blocks_3_0_in_layers_2", "output_blocks_4_0_in_layers_2", "output_blocks_5_0_in_layers_2")
PATCHES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("RescaleCFG", "", {}),
    ("CFGZeroStar", "", {}),
    ("CFGNorm", "", {"strength": 0.9}),
    ("APG", "", {"momentum": -0.5}),
    ("TCFG", "", {}),
    ("Mahiro", "", {}),
    ("SkipLayerGuidanceDiT", "no such layers in a UNet", {"start_percent": 0.0}),
    ("PerturbedAttentionGuidance", "", {}),
    ("SelfAttentionGuidance", "", {}),
    ("FreeU", "", {}),
    ("FreeU_V2", "", {"b1": 1.1, "b2": 1.1}),
    ("FreSca", "cutoff 4", {"freq_cutoff": 4}),
    ("HyperTile", "tiles of 32 px", {"tile_size": 32, "max_depth": 2}),
    ("TomePatchModel", "this model has no attention at its largest maps", {}),
    ("PatchModelAddDownscale", "the first half", {"block_number": 2, "end_percent": 0.5}),
    ("UNetSelfAttentionMultiply", "", {"q": 1.1}),
    ("Epsilon Scaling", "", {}),
    ("EasyCache", "", {}),
    ("EasyCache", "threshold 0.5", {"reuse_threshold": 0.5, "start_percent": 0.0}),
    ("LazyCache", "", {}),
    ("LazyCache", "threshold 0.5", {"reuse_threshold": 0.5, "start_percent": 0.0}),
)


def combinations() -> tuple[Combination, ...]:
    found = [
        Combination(nodes=name, tried=tried or "defaults", run=functools.partial(_patched, patch=name, **inputs))
        for name, tried, inputs in PATCHES
        if has_node(name)
    ]
    caches = [name for name in ("EasyCache", "LazyCache") if has_node(name)]
    found += [
        Combination(nodes=name, tried="put on the guided model", run=functools.partial(_patched, patch=name, first=True))
        for name in caches
    ]
    if has_node("ContextWindowsManual"):
        found += WINDOWS
    if has_node("RenormCFG"):
        found.append(Combination(nodes="RenormCFG", tried="picture by picture", run=_renorm))
    return (*found, *PROMPTS, *HOOKS)


def compiled() -> tuple[Combination, ...]:
    """Apart from the others: compiling takes minutes."""
    return COMPILED


def _patched(bench: Bench, guide: Guide, patch: str, first: bool = False, **inputs: Any) -> Tensor:
    if first:
        return bench.ksampler(node(patch, model=guide(bench.model), **inputs))
    return bench.ksampler(guide(node(patch, model=bench.model, **inputs)))


def _renorm(bench: Bench, guide: Guide) -> Tensor:
    """The node takes one picture at a time."""
    model = node("RenormCFG", model=bench.model)
    return torch.cat([
        bench.ksampler(guide(model, bench.target(k)), latent_image=bench.latent(1), seed=SEED + k)
        for k in range(bench.pictures)
    ])  # fmt: skip


def _windows(bench: Bench, guide: Guide, schedule: str, fuse: str = "pyramid", dim: int = 0) -> Tensor:
    """Windows of 2 over the batch, each picture with a control of its own; or, picture by picture, of 12 rows or columns."""
    length, overlap = (2, 1) if dim == 0 else (12, 4)
    model = node(
        "ContextWindowsManual", model=bench.model, context_length=length, context_overlap=overlap,
        context_schedule=schedule, fuse_method=fuse, dim=dim,
    )  # fmt: skip
    if dim == 0:
        return bench.ksampler(guide(model))
    return torch.cat([
        bench.ksampler(guide(model, bench.target(k)), latent_image=bench.latent(1), seed=SEED + k)
        for k in range(bench.pictures)
    ])  # fmt: skip


WINDOWS = (
    *(
        Combination(nodes="ContextWindowsManual", tried=f"{schedule}, windows of 2 pictures",
                    run=functools.partial(_windows, schedule=schedule))
        for schedule in ("standard_static", "standard_uniform", "looped_uniform", "batched")
    ),
    Combination(nodes="ContextWindowsManual", tried="standard_static, relative",
                run=functools.partial(_windows, schedule="standard_static", fuse="relative")),
    Combination(nodes="ContextWindowsManual", tried="standard_static, over the rows of the latent",
                run=functools.partial(_windows, schedule="standard_static", dim=2)),
    Combination(nodes="ContextWindowsManual", tried="standard_uniform, over the columns of the latent",
                run=functools.partial(_windows, schedule="standard_uniform", dim=3)),
)  # fmt: skip


def _starts_later(bench: Bench, guide: Guide) -> Tensor:
    """One prompt to a fifth of the time, another from there."""
    first = node("ConditioningSetTimestepRange", conditioning=bench.prompt("a blue figure"), start=0.0, end=0.2)
    second = node("ConditioningSetTimestepRange", conditioning=bench.positive, start=0.2, end=1.0)
    both = node("ConditioningCombine", conditioning_1=first, conditioning_2=second)
    return bench.ksampler(guide(bench.model), positive=both)


def _gap(bench: Bench, guide: Guide) -> Tensor:
    """No prompt is active in the first fifth of the time."""
    late = node("ConditioningSetTimestepRange", conditioning=bench.positive, start=0.2, end=1.0)
    return bench.ksampler(guide(bench.model), positive=late)


def _areas(bench: Bench, guide: Guide, whole: bool) -> Tensor:
    left = node("ConditioningSetArea", conditioning=bench.positive, width=64, height=128, x=0, y=0)
    right = node("ConditioningSetArea", conditioning=bench.positive, width=64, height=128, x=64, y=0)
    prompts = node("ConditioningCombine", conditioning_1=left, conditioning_2=right)
    if whole:
        prompts = node("ConditioningCombine", conditioning_1=prompts, conditioning_2=bench.prompt("a red figure"))
    return bench.ksampler(guide(bench.model), positive=prompts)


def _masked_prompts(bench: Bench, guide: Guide) -> Tensor:
    mask = torch.zeros(1, 128, 128)
    mask[:, :, :64] = 1
    left = node("ConditioningSetMask", conditioning=bench.positive, mask=mask)
    right = node("ConditioningSetMask", conditioning=bench.prompt("a red figure, pink wall"), mask=1 - mask)
    both = node("ConditioningCombine", conditioning_1=left, conditioning_2=right)
    return bench.ksampler(guide(bench.model), positive=both)


PROMPTS = (
    Combination(nodes="ConditioningSetTimestepRange", tried="two prompts, one after the other", run=_starts_later),
    Combination(nodes="ConditioningSetTimestepRange", tried="no prompt before 0.2", run=_gap),
    Combination(nodes="ConditioningSetArea", tried="two halves", run=functools.partial(_areas, whole=False)),
    Combination(nodes="ConditioningSetArea", tried="two halves and a whole", run=functools.partial(_areas, whole=True)),
    Combination(nodes="ConditioningSetMask", tried="two halves", run=_masked_prompts),
)


def random_lora(bench: Bench, size: float = 0.5) -> dict[str, Tensor]:
    """A LoRA of the demo model with random weights that changes its pictures."""
    generator, network = torch.Generator().manual_seed(0), bench.model.model.diffusion_model
    found: dict[str, Tensor] = {}
    for layer in LORA_LAYERS:
        block, number = int(layer.split("_")[2]), int(layer.split("_")[3])
        weight = network.output_blocks[block][number].in_layers[2].weight
        up = torch.randn(weight.shape[0], 4, 1, 1, generator=generator) * size / 2
        down = torch.randn(4, *weight.shape[1:], generator=generator) * size / weight[0].numel() ** 0.5
        found |= {f"lora_unet_{layer}.lora_up.weight": up, f"lora_unet_{layer}.lora_down.weight": down}
    return found


def _lora(bench: Bench, guide: Guide) -> Tensor:
    import comfy.sd

    model, _ = comfy.sd.load_lora_for_models(bench.model, None, random_lora(bench), 1.0, 0.0)
    return bench.ksampler(guide(model))


def _hooked(bench: Bench, guide: Guide, keyframes: bool = False, masks: bool = False) -> Tensor:
    """A LoRA on the positive prompt only; growing over the time, or in the left half of the picture."""
    import comfy.hooks

    hooks = comfy.hooks.create_hook_lora(lora=random_lora(bench), strength_model=1.0, strength_clip=0.0)
    if keyframes:
        frames = node("CreateHookKeyframesInterpolated", strength_start=0.0, strength_end=1.0, keyframes_count=5)
        hooks = node("SetHookKeyframes", hooks=hooks, hook_kf=frames)
    clip = node("SetClipHooks", clip=bench.world.clip, hooks=hooks, apply_to_conds=True, schedule_clip=False)
    positive = node("CLIPTextEncode", clip=clip, text="a red figure, grey wall")
    if masks:
        mask = torch.zeros(1, 128, 128)
        mask[:, :, :64] = 1
        positive = node("PairConditioningSetProperties", positive_NEW=positive, negative_NEW=bench.negative, mask=mask)[0]
        rest = node("ConditioningSetMask", conditioning=bench.positive, mask=1 - mask)
        positive = node("ConditioningCombine", conditioning_1=positive, conditioning_2=rest)
    return bench.ksampler(guide(bench.model), positive=positive)


HOOKS = (
    Combination(nodes="LoraLoader", tried="random weights", run=_lora),
    Combination(nodes="CreateHookLora, SetClipHooks", tried="a LoRA on the positive prompt", run=_hooked),
    Combination(nodes="CreateHookKeyframesInterpolated", tried="a LoRA that grows",
                run=functools.partial(_hooked, keyframes=True)),
    Combination(nodes="PairConditioningSetProperties", tried="a LoRA in the left half",
                run=functools.partial(_hooked, masks=True)),
)  # fmt: skip


def _compiled(bench: Bench, guide: Guide, first: bool) -> Tensor:
    """TorchCompileModel before guidance, or after it."""
    if first:
        return bench.ksampler(guide(node("TorchCompileModel", model=bench.model)))
    return bench.ksampler(node("TorchCompileModel", model=guide(bench.model)))


COMPILED = (
    Combination(nodes="TorchCompileModel", tried="compiled, then guided", run=functools.partial(_compiled, first=True),
                same=True),
    Combination(nodes="TorchCompileModel", tried="guided, then compiled", run=functools.partial(_compiled, first=False),
                same=True),
)  # fmt: skip
