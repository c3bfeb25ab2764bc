"""Packs that change a model's layers or its attention: GGUF, sd-perturbed-attention, KJNodes."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..bench import CFG, Bench, Guide
from ..loading import has_node, node, pack_module
from ..trial import Combination
from .core_models import random_lora

GGUF = "ComfyUI-GGUF"


def gguf() -> tuple[Combination, ...]:
    return tuple(
        Combination(nodes="Unet Loader (GGUF)", tried=tried, run=functools.partial(_quantised, kind=kind, lora=lora))
        for tried, kind, lora in (
            ("F16 layers", "F16", False),
            ("Q8_0 layers", "Q8_0", False),
            ("Q4_0 layers", "Q4_0", False),
            ("Q8_0 layers and a LoRA", "Q8_0", True),
        )
    )


def _quantised(bench: Bench, guide: Guide, kind: str, lora: bool) -> Tensor:
    """The demo model with its weights as the loader makes them of a file; what doesn't divide into blocks stays fp32."""
    import comfy.sd
    import gguf as library

    from ....comfy_host.demo_model.unet import UNET_CONFIG, DemoModelConfig

    assert bench.folder is not None
    ops = pack_module(bench.folder / GGUF, "ops")
    patcher = pack_module(bench.folder / GGUF, "nodes").GGUFModelPatcher
    config = DemoModelConfig(UNET_CONFIG)
    config.custom_operations = ops.GGMLOps()
    made = config.get_model({}, "", device=bench.model.load_device)
    quant, state = getattr(library.GGMLQuantizationType, kind), {}
    block = library.GGML_QUANT_SIZES[quant][0]
    for name, weight in bench.model.model.diffusion_model.state_dict().items():
        fits = weight.ndim > 1 and weight.shape[-1] % block == 0
        data = library.quants.quantize(weight.detach().float().numpy(), quant) if fits else weight.float().numpy()
        used = quant if fits else library.GGMLQuantizationType.F32
        state[name] = ops.GGMLTensor(torch.from_numpy(data.copy()), tensor_type=used, tensor_shape=weight.shape)
    made.diffusion_model.load_state_dict(state, strict=False)
    device = bench.model.load_device
    model = patcher.clone(type(bench.model)(made, load_device=device, offload_device=device))
    if lora:
        model, _ = comfy.sd.load_lora_for_models(model, None, random_lora(bench), 1.0, 0.0)
    return bench.ksampler(guide(model))


WINDOW = {"tile_width": 96, "tile_height": 96, "tile_overlap": 64, "sigma_end": -1.0}
PERTURBED: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("PerturbedAttention", "middle block", {}),
    ("PerturbedAttention", "rescaled, to sigma 2", {"rescale": 0.5, "sigma_start": 15.0, "sigma_end": 2.0}),
    ("SmoothedEnergyGuidanceAdvanced", "middle block", {}),
    ("SlidingWindowGuidanceAdvanced", "windows of 96 px", WINDOW),
    ("TokenPerturbationGuidance", "middle block", {"unet_block_list": "m0"}),
    ("PLADIS", "defaults", {}),
    ("FrequencyDecoupledGuidance", "strength 6", {"strength_high": 6.0}),
    ("MomentumGuidance", "defaults", {"momentum": 0.5, "ema": 0.6}),
    ("SlidingModeControlCFG", "defaults", {"lambda": 6.0, "k": 0.1}),
)


def perturbed() -> tuple[Combination, ...]:
    return (
        *(
            Combination(nodes=name, tried=tried, run=functools.partial(_patched, name=name, inputs=inputs))
            for name, tried, inputs in PERTURBED
        ),
        Combination(nodes="NormalizedAttentionGuidance", tried="an empty negative prompt", run=_nag),
        Combination(nodes="PerturbedAttention", tried="put on the guided model",
                    run=functools.partial(_patched, name="PerturbedAttention", inputs={}, first=True)),
    )  # fmt: skip


def _patched(bench: Bench, guide: Guide, name: str, inputs: dict[str, Any], first: bool = False) -> Tensor:
    if first:
        return bench.ksampler(node(name, model=guide(bench.model), **inputs))
    return bench.ksampler(guide(node(name, model=bench.model, **inputs)))


def _nag(bench: Bench, guide: Guide) -> Tensor:
    model = node("NormalizedAttentionGuidance", model=bench.model, negative=bench.prompt("a blue figure"))
    return bench.ksampler(guide(model))


KJ: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("CFGZeroStarAndInit", "two steps of zero", {"zero_init_steps": 1}),
    ("CFGZeroStarAndInit", "without zero steps", {"use_zero_init": False}),
    ("PatchModelPatcherOrder", "defaults", {}),
    ("ModelPatchTorchSettings", "defaults", {}),
    ("ModelMemoryUsageFactorOverride", "defaults", {}),
)


def kjnodes() -> tuple[Combination, ...]:
    return (
        *(
            Combination(nodes=name, tried=tried, run=functools.partial(_patched, name=name, inputs=inputs))
            for name, tried, inputs in KJ
            if has_node(name)
        ),
        Combination(nodes="ScheduledCFGGuidance", tried="cfg 3 from 0.1 to 0.6", run=_scheduled_cfg),
        Combination(nodes="ModelPreviewOverrideKJ", tried="without a page", run=_preview, same=True),
        Combination(nodes="DifferentialDiffusionAdvanced", tried="a mask that fades", run=_differential),
        Combination(nodes="InjectNoiseToLatent", tried="a finished picture and noise, denoise 0.8", run=_noise),
        # These take minutes where nothing is compiled yet.
        Combination(nodes="TorchCompileModelAdvanced", tried="compiled, then guided", run=_compiled, same=True),
        Combination(nodes="TorchCompileModelAdvanced", tried="guided, then compiled",
                    run=functools.partial(_compiled, first=True), same=True),
    )  # fmt: skip


def _scheduled_cfg(bench: Bench, guide: Guide) -> Tensor:
    out = node("ScheduledCFGGuidance", model=guide(bench.model), positive=bench.positive, negative=bench.negative, cfg=CFG,
               start_percent=0.1, end_percent=0.6)  # fmt: skip
    return bench.custom(out[0] if isinstance(out, tuple) else out)


def _preview(bench: Bench, guide: Guide) -> Tensor:
    import nodes

    found = nodes.NODE_CLASS_MAPPINGS["ModelPreviewOverrideKJ"]
    if hasattr(found, "PREPARE_CLASS_CLONE"):  # the node asks for its own id
        found = found.PREPARE_CLASS_CLONE({"hidden_inputs": {}} if isinstance(found.hidden, dict) else None)
    given = {"max_resolution": 512, "jpeg_quality": 80, "suppress_default_preview": False, "preview_frames": 1,
             "preview_fps": 12, "tiny_vae": "none"}  # fmt: skip
    return bench.ksampler(guide(found.execute(model=bench.model, **given).result[0]))


def _differential(bench: Bench, guide: Guide) -> Tensor:
    latent = {"samples": bench.ksampler(bench.model)}
    mask = torch.linspace(0.3, 1.0, 128).expand(1, 128, 128).contiguous()
    model, latent = node("DifferentialDiffusionAdvanced", model=bench.model, samples=latent, mask=mask)
    return bench.ksampler(guide(model), latent_image=latent)


def _noise(bench: Bench, guide: Guide) -> Tensor:
    latent = {"samples": bench.ksampler(bench.model)}
    noise = {"samples": torch.randn(latent["samples"].shape, generator=torch.Generator().manual_seed(1))}
    latent = node("InjectNoiseToLatent", latents=latent, strength=0.2, noise=noise)
    model = guide(bench.model, bench.target(end_percent=0.9))
    return bench.ksampler(model, latent_image=latent, denoise=0.8)


def _compiled(bench: Bench, guide: Guide, first: bool = False) -> Tensor:
    if first:
        return bench.ksampler(node("TorchCompileModelAdvanced", model=guide(bench.model)))
    return bench.ksampler(guide(node("TorchCompileModelAdvanced", model=bench.model)))
