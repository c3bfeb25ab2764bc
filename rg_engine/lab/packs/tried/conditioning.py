"""What rides on prompts: Advanced-ControlNet, IPAdapter_plus, prompt-control."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ...cost.models import SHAPES, control_network, randomise
from ..bench import Bench, Guide
from ..loading import node, pack_module, run_graph
from ..trial import Combination
from .core_models import random_lora

IPADAPTER = "ComfyUI_IPAdapter_plus"


def advanced_controlnet() -> tuple[Combination, ...]:
    def controlled(tried: str, **more: Any) -> Combination:
        return Combination(nodes="ACN_AdvancedControlNetApply", tried=tried, run=functools.partial(_controlled, **more))

    return (
        controlled("random weights"),
        controlled("strength keyframes over the time", keyframes=True),
        controlled("another strength for each picture", latents=True),
        controlled("soft weights", soft=True),
        controlled("a mask", masked=True),
        controlled("the first half of the time", end_percent=0.5),
        Combination(nodes="ControlNetApplyAdvanced", tried="ComfyUI's own, beside the pack",
                    run=functools.partial(_controlled, own=True)),
    )  # fmt: skip


def _controlled(
    bench: Bench, guide: Guide, keyframes: bool = False, latents: bool = False, soft: bool = False, masked: bool = False,
    own: bool = False, **inputs: Any,
) -> Tensor:  # fmt: skip
    import comfy.controlnet

    network = control_network(SHAPES["demo"], torch.float32)
    randomise(network)
    control = comfy.controlnet.ControlNet(network, load_device=bench.model.load_device)
    given: dict[str, Any] = {"positive": bench.positive, "negative": bench.negative, "control_net": control,
                             "image": bench.wanted.depth, "strength": 0.1, "start_percent": 0.0,
                             "end_percent": 1.0}  # fmt: skip
    if keyframes:
        given["timestep_kf"] = node(
            "ACN_TimestepKeyframeInterpolation|TimestepKeyframeInterpolationNode", start_percent=0.0, end_percent=1.0,
            strength_start=1.0, strength_end=0.0, interpolation="linear", intervals=10,
        )  # fmt: skip
    if latents:
        given["latent_kf_override"] = node(
            "LatentKeyframeTiming|LatentKeyframeInterpolationNode", batch_index_from=0, batch_index_to_excl=bench.pictures,
            strength_from=0.2, strength_to=1.0, interpolation="linear",
        )  # fmt: skip
    if soft:
        given["weights_override"] = node("ScaledSoftControlNetWeights|ScaledSoftUniversalWeights", base_multiplier=0.8)[0]
    if masked:
        given["mask_optional"] = torch.ones(1, 128, 128)
        given["mask_optional"][:, :, 64:] = 0
    apply = "ControlNetApplyAdvanced" if own else "ACN_AdvancedControlNetApply_v2|AdvancedControlNetApply"
    positive, negative = node(apply, **{**given, **inputs})[:2]
    return bench.ksampler(guide(bench.model), positive=positive, negative=negative)


def ipadapter() -> tuple[Combination, ...]:
    return tuple(
        Combination(nodes="IPAdapter's attention patch", tried=tried, run=functools.partial(_adapted, **more))
        for tried, more in (
            ("random weights", {}),
            ("K+V, the first half of the time", {"embeds_scaling": "K+V", "half": True}),
            ("a mask", {"masked": True}),
            ("an embedding for each picture", {"unfold_batch": True}),
        )
    )


class _Adapter(nn.Module):
    """What the pack's attention patch asks of an IPAdapter."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.ip_layers = layers

    def get_multigpu_clone(self, device: Any) -> _Adapter:
        return self


def _adapted(
    bench: Bench, guide: Guide, half: bool = False, masked: bool = False, unfold_batch: bool = False,
    embeds_scaling: str = "V only",
) -> Tensor:  # fmt: skip
    """Four tokens of a random picture embedding into every cross attention of the demo model."""
    assert bench.folder is not None
    module = pack_module(bench.folder / IPADAPTER, "IPAdapterPlus")
    network, weights, keys = bench.model.model.diffusion_model, {}, []
    blocks = [("input", i, b) for i, b in enumerate(network.input_blocks)]
    blocks += [("output", i, b) for i, b in enumerate(network.output_blocks)] + [("middle", 1, network.middle_block)]
    generator = torch.Generator().manual_seed(0)
    for where, number, block in blocks:
        for layer in block:
            if hasattr(layer, "transformer_blocks"):
                out, width = layer.transformer_blocks[0].attn2.to_k.weight.shape
                keys.append((where, number))
                for name in ("k", "v"):
                    weight = torch.randn(out, width, generator=generator) * 0.6 / width**0.5
                    weights[f"{2 * len(keys) - 1}.to_{name}_ip.weight"] = weight
    tokens = torch.randn(bench.pictures if unfold_batch else 1, 4, width, generator=generator)
    model, sampling = bench.model.clone(), bench.model.get_model_object("model_sampling")
    mask = torch.ones(1, 128, 128)
    mask[:, :, 64:] = 0
    given = {
        "ipadapter": _Adapter(module.To_KV(weights)), "weight": 1.0, "cond": tokens, "cond_alt": None,
        "uncond": torch.zeros_like(tokens), "weight_type": "linear", "mask": mask if masked else None,
        "sigma_start": sampling.percent_to_sigma(0.0), "sigma_end": sampling.percent_to_sigma(0.5 if half else 1.0),
        "unfold_batch": unfold_batch, "embeds_scaling": embeds_scaling,
    }  # fmt: skip
    for number, key in enumerate(keys):
        module.set_model_patch_replace(model, {**given, "module_key": str(2 * number + 1)}, key)
    return bench.ksampler(guide(model))


def prompt_control() -> tuple[Combination, ...]:
    def scheduled(tried: str, text: str, lora: str = "") -> Combination:
        nodes = "PCLazyLoraLoader, PCLazyTextEncode" if lora else "PCLazyTextEncode"
        return Combination(nodes=nodes, tried=tried, run=functools.partial(_scheduled, text=text, lora=lora))

    return (
        scheduled("one prompt", "a red figure, grey wall"),
        scheduled("a word that changes at 0.2", "a [blue:red:0.2] figure, grey wall"),
        scheduled("a prompt that starts at 0.2", "[:a red figure, grey wall:0.2]"),
        scheduled("a prompt that ends at 0.3", "[a red figure, grey wall::0.3]"),
        scheduled("two words by turns", "a [blue|red:0.1] figure, grey wall"),
        scheduled("two prompts with AND", "a red figure AND grey wall :0.5"),
        scheduled("a LoRA to 0.5", "a red figure, grey wall", "[<lora:readout_guidance_test:1>::0.5]"),
        scheduled("a LoRA from 0.2", "a red figure, grey wall", "[:<lora:readout_guidance_test:1>:0.2]"),
        scheduled("a LoRA all the time", "a red figure, grey wall", "<lora:readout_guidance_test:1>"),
    )


def _scheduled(bench: Bench, guide: Guide, text: str, lora: str = "") -> Tensor:
    model, clip = bench.model, bench.world.clip
    if lora:
        path = Path(_lora_folder().name) / "readout_guidance_test.safetensors"
        if not path.exists():
            save_file(random_lora(bench), path)
        model, clip = run_graph("PCLazyLoraLoader", {"model": model, "clip": clip}, text=lora)
    positive = run_graph("PCLazyTextEncode", {"clip": clip}, text=text)
    return bench.ksampler(guide(model), positive=positive)


@functools.cache
def _lora_folder() -> tempfile.TemporaryDirectory:
    """A folder of LoRAs that ComfyUI knows, for as long as this process lives."""
    import folder_paths

    folder = tempfile.TemporaryDirectory()
    folder_paths.add_model_folder_path("loras", folder.name)
    return folder
