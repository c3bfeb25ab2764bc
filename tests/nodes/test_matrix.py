"""Guidance steers with everything that a KSampler may be used with."""

from __future__ import annotations

import json

import pytest
import torch
from comfyui_host import engine, find_comfyui, node
from small_models import parity_model

DRAG = json.dumps({"version": 1, "drags": [{"from": [0.3, 0.3], "to": [0.7, 0.6]}]})


def sampler_names() -> list[str]:
    """KSampler's samplers, read without importing ComfyUI (collection runs before it is started)."""
    source = (find_comfyui() / "comfy" / "samplers.py").read_text(encoding="utf-8")
    start = source.index("KSAMPLER_NAMES = [")
    names = source[start : source.index("]", start)].split("[")[1]
    return [name.strip().strip('"') for name in names.split(",") if name.strip()] + ["ddim", "uni_pc", "uni_pc_bh2"]


def assert_steered(small, guided, unguided, control=None) -> None:
    assert torch.isfinite(guided).all()
    assert (small.control_error(guided, control) < small.control_error(unguided, control)).all()


@pytest.mark.parametrize("scheduler", ["normal", "karras"])
@pytest.mark.parametrize("sampler", sampler_names())
def test_every_sampler(small, sampler, scheduler):
    inputs = {"sampler_name": sampler, "scheduler": scheduler}
    assert_steered(small, small.sample(small.target(), **inputs), small.plain(**inputs))


def test_all_samplers_were_tried(small):
    import comfy.samplers

    assert sorted(sampler_names()) == sorted(comfy.samplers.KSampler.SAMPLERS)


@pytest.mark.parametrize("mode", ["fast", "reference"])
@pytest.mark.parametrize("cfg", [1.0, 7.5])
def test_cfg(small, cfg, mode):
    guided = small.sample(small.target(), cfg=cfg, mode=mode, strength=3.0, iterations=4)
    assert_steered(small, guided, small.plain(cfg=cfg))


@pytest.mark.parametrize("mode", ["fast", "reference"])
@pytest.mark.parametrize("controls", [1, 3])
def test_a_batch_of_three_with_one_control_or_three(small, controls, mode):
    latent = {"samples": torch.zeros(3, 4, 16, 16)}
    control = torch.rand(controls, 16, 16, 3, generator=torch.Generator().manual_seed(1))
    guided = small.sample(small.target(image=control), latent_image=latent, mode=mode, strength=3.0, iterations=4)
    assert_steered(small, guided, small.plain(latent_image=latent), control)


def test_a_picture_of_a_batch_is_the_picture_alone(small):
    latent = {"samples": torch.zeros(2, 4, 16, 16)}
    control = torch.rand(2, 16, 16, 3, generator=torch.Generator().manual_seed(1))
    alike = {"strength": 1.0, "feature_steps": 1}
    both = small.sample(small.target(image=control), latent_image=latent, **alike)
    second = {"samples": torch.zeros(1, 4, 16, 16), "batch_index": [1]}
    alone = small.sample(small.target(image=control[1:]), latent_image=second, **alike)
    effect = alone - small.plain(latent_image=second)
    assert (both[1:] - alone).norm() < 0.05 * effect.norm()  # what is left is rounding, which random weights amplify


def test_denoise_half(small):
    latent = {"samples": small.plain()}
    guided = small.sample(small.target(end_percent=1.0), latent_image=latent, denoise=0.5)
    assert_steered(small, guided, small.plain(latent_image=latent, denoise=0.5))


@pytest.mark.parametrize("mode", ["fast", "reference"])
@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral", "dpmpp_2m"])
def test_an_inpaint_mask_keeps_what_is_outside(small, sampler, mode):
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., :8] = 1
    latent = {"samples": small.plain(), "noise_mask": mask}
    target = small.target(mask=mask[:, 0])
    guided = small.sample(target, latent_image=latent, sampler_name=sampler, mode=mode, strength=3.0)
    unguided = small.plain(latent_image=latent, sampler_name=sampler)
    assert torch.equal(guided[..., 8:], unguided[..., 8:])
    assert not torch.allclose(guided[..., :8], unguided[..., :8], atol=1e-2)


@pytest.mark.parametrize("mode", ["fast", "reference"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_weights_that_are_stored_in_less_precision(small, dtype, mode):
    model = parity_model(dtype)
    assert model.model.diffusion_model.middle_block[1].proj_in.weight.dtype == dtype
    assert_steered(small, small.sample(small.target(), model=model, mode=mode, strength=3.0), small.plain(model=model))


def lora_of(weight) -> dict:
    """Of a convolution in the middle of the decoder."""
    generator = torch.Generator().manual_seed(0)
    name = "lora_unet_up_blocks_2_resnets_0_conv1"
    return {
        f"{name}.lora_up.weight": torch.randn(weight.shape[0], 2, 1, 1, generator=generator) * 0.3,
        f"{name}.lora_down.weight": torch.randn(2, *weight.shape[1:], generator=generator) * 0.3,
    }


@pytest.mark.parametrize("graph", ["full", "light"])
@pytest.mark.parametrize("kind", ["attn1_output_patch", "forward"])
def test_other_nodes_code_with_weights_of_its_own(small, kind, graph, monkeypatch):
    """As IPAdapter's patches and bypass LoRAs have them: made in inference mode, multiplied with what has a gradient."""
    model, widths = small.model.clone(), {}

    def added(n):
        width = n.shape[-1]
        if width not in widths:
            widths[width] = torch.randn(width, width, generator=torch.Generator().manual_seed(width)) * 0.3 / width**0.5
        return n + n @ widths[width]

    if kind == "forward":
        layer = model.model.diffusion_model.output_blocks[6][0].emb_layers[1]
        original = layer.forward
        monkeypatch.setattr(layer, "forward", lambda emb: added(original(emb)))
        query = model.model.diffusion_model.middle_block[1].transformer_blocks[0].attn1.to_q
        ask = query.forward
        monkeypatch.setattr(query, "forward", lambda x: added(ask(x)))
    else:
        model.set_model_attn1_output_patch(lambda n, options: added(n))
    unguided = small.plain(model=model, steps=2)
    assert all(weight.is_inference() for weight in widths.values())
    settings = engine("guidance").GuidanceSettings(strength=2.0)
    guided = small.plain(model=engine("comfy_host.guided.model").guide(model, small.target(), settings, graph), steps=2)
    assert guided.isfinite().all()
    assert not torch.allclose(guided, unguided, atol=1e-2)


@pytest.mark.parametrize("graph", ["full", "light"])
def test_a_lora_beside_the_weights(small, graph):
    """ComfyUI's newer bypass LoRAs run beside a layer, and leave its weight as it is."""
    import comfy.sd

    if not hasattr(comfy.sd, "load_bypass_lora_for_models"):
        pytest.skip("this ComfyUI has none")
    lora = lora_of(small.model.model.diffusion_model.output_blocks[6][0].in_layers[2].weight)
    beside, _ = comfy.sd.load_bypass_lora_for_models(small.model, None, lora, 1.0, 0.0)
    within, _ = comfy.sd.load_lora_for_models(small.model, None, lora, 1.0, 0.0)
    settings = engine("guidance").GuidanceSettings(strength=2.0)
    guide = engine("comfy_host.guided.model").guide
    found, wanted, unguided = (
        small.plain(model=model, steps=2)  # with more steps, rounding grows
        for model in (guide(beside, small.target(), settings, graph), guide(within, small.target(), settings, graph), beside)
    )
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(found, unguided, atol=1e-2)


def test_a_lora(small):
    import comfy.sd

    weight = small.model.model.diffusion_model.output_blocks[6][0].in_layers[2].weight
    lora = lora_of(weight)
    model, _ = comfy.sd.load_lora_for_models(small.model, None, lora, 1.0, 0.0)
    before = weight.clone()
    unguided = small.plain(model=model)
    assert not torch.equal(unguided, small.plain())
    small.model = model
    assert_steered(small, small.sample(small.target()), unguided)
    model.unpatch_model()
    assert torch.equal(small.model.model.diffusion_model.output_blocks[6][0].in_layers[2].weight, before)


@pytest.mark.parametrize("mode", ["fast", "reference"])
def test_a_controlnet(small, mode):
    import comfy.cldm.cldm
    import comfy.controlnet
    import comfy.ops

    unet_config = small.model.model.model_config.unet_config
    others = ("out_channels", "transformer_depth_output", "disable_unet_model_creation")
    config = {key: value for key, value in unet_config.items() if key not in others}
    net = comfy.cldm.cldm.ControlNet(hint_channels=3, operations=comfy.ops.disable_weight_init, device="cpu", **config)
    engine("lab.cost.models").randomise(net, seed=1)
    seen = []
    net.register_forward_pre_hook(lambda *_: seen.append(torch.is_grad_enabled() and not torch.is_inference_mode_enabled()))
    device = small.model.load_device
    control = comfy.controlnet.ControlNet(net, load_device=device, manual_cast_dtype=None)
    control.set_cond_hint(small.control.repeat_interleave(8, 1).repeat_interleave(8, 2).movedim(-1, 1), 0.5, (0.0, 1.0))
    conditioning = [[small.positive[0][0], {"control": control, "control_apply_to_uncond": True}]]
    guided = small.sample(small.target(), positive=conditioning, mode=mode, strength=3.0, iterations=4)
    assert seen
    assert not any(seen), "the ControlNet ran with a graph"
    unguided = small.plain(positive=conditioning)
    assert not torch.equal(unguided, small.plain())
    assert_steered(small, guided, unguided)


@pytest.mark.parametrize("mode", ["fast", "reference"])
def test_a_patch_that_writes_in_place(small, mode):
    """FreeU scales part of the features in place, between the taps."""
    from comfy_extras.nodes_freelunch import FreeU

    patched = FreeU().patch(small.model, 1.3, 1.4, 0.9, 0.2)
    model = patched[0] if isinstance(patched, tuple) else patched.result[0]
    unguided = small.plain(model=model)
    assert not torch.equal(unguided, small.plain())
    small.model = model
    assert_steered(small, small.sample(small.target(), mode=mode, strength=3.0, iterations=4), unguided)


def test_both_branches_of_a_guided_step_run_by_the_same_attention(small, monkeypatch):
    """cfg would multiply the difference between two kernels as it does that between prompts."""
    attention, maps, guided = engine("comfy_host.guided.attention"), [], 5
    kernel = attention.attention_pytorch

    def counted(q, *args, **kwargs):
        maps.append(q.shape[1])
        return kernel(q, *args, **kwargs)

    monkeypatch.setattr(attention, "attention_pytorch", counted)
    small.sample(small.target(), latent_image={"samples": torch.zeros(1, 4, 24, 24)}, steps=11)  # a move a guided step
    assert max(maps) == 24 * 24
    assert maps == maps[: len(maps) // (2 * guided)] * (2 * guided)


def test_another_nodes_attention_stays_in_the_branch_that_is_not_read(small):
    batches = set()

    def override(kernel, q, *args, **kwargs):
        batches.add(len(q))
        return kernel(q, *args, **kwargs)

    model = small.model.clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = override
    small.sample(small.target(), model=model)
    assert batches == {1, 2}  # a guided step runs the negative prompt by itself, another step both


def test_perturbed_attention_guidance_still_perturbs(small):
    """It runs the same prompt a second time at each step, with other attention."""
    from comfy_extras import nodes_pag

    patched = nodes_pag.PerturbedAttentionGuidance
    model = (
        patched.execute(small.model, 3.0).result[0] if hasattr(patched, "execute") else patched().patch(small.model, 3.0)[0]
    )
    weak = {"strength": 1e-6, "keep_negative": 0}
    assert torch.allclose(small.sample(small.target(), model=model, **weak), small.plain(model=model), atol=1e-1)
    assert not torch.allclose(small.plain(model=model), small.plain(), atol=1.0)
    unguided = small.plain(model=model)
    small.model = model
    assert_steered(small, small.sample(small.target()), unguided)


def test_two_chained_targets(small):
    points, _ = node("RG_DragPoints", points=DRAG)
    chained = small.target("correspondence", drag_points=points, previous=small.target(weight=2.0))
    guided = small.sample(chained)
    assert_steered(small, guided, small.plain())
    assert not torch.equal(guided, small.sample(small.target(weight=2.0)))


def test_a_mask_on_a_target_steers_its_region_most(small):
    mask = torch.zeros(1, 16, 16)
    mask[:, :, :8] = 1
    guided, unguided = small.sample(small.target(mask=mask)), small.plain()
    left = (guided - unguided)[..., :8].square().mean()
    right = (guided - unguided)[..., 8:].square().mean()
    assert left > right


def test_a_regional_prompt_without_a_whole_one(small):
    words = small.positive[0][0]
    regions = [[words, {"area": (16, 8, 0, 0), "strength": 1.0}], [-words, {"area": (16, 8, 0, 8), "strength": 1.0}]]
    guided = small.sample(small.target(), positive=regions)
    assert_steered(small, guided, small.plain(positive=regions))


def test_drag_and_appearance_share_the_noise_of_their_source(small):
    """At a strength of next to nothing the guided run is the unguided one, also with noise from the global generator."""
    points, _ = node("RG_DragPoints", points=DRAG)
    target = small.target("correspondence", drag_points=points, previous=small.target("appearance"))
    for sampler in ("euler_ancestral", "dpmpp_sde", "lcm"):
        guided = small.sample(target, strength=1e-6, sampler_name=sampler)
        assert torch.allclose(guided, small.plain(sampler_name=sampler), atol=1e-2)


@pytest.mark.parametrize("mode", ["fast", "reference"])
def test_the_look_of_a_reference_latent(small, mode):
    """The readouts of the guided picture are nearer to the reference's than the unguided one's, also beside a drag."""
    reference = small.plain(seed=77)
    look = small.target("appearance", reference_latent={"samples": reference})
    points, _ = node("RG_DragPoints", points=DRAG)
    drag = small.target("correspondence", drag_points=points, previous=look, weight=0.01)

    def readout(samples):
        return node("RG_ReadOut", model=small.model, head=small.head("appearance"), latent={"samples": samples},
                    noise_percent=0.1, seed=0, positive=small.positive)[0]  # fmt: skip

    def distance(samples):
        return float(1 - torch.cosine_similarity(readout(samples), readout(reference), dim=1).mean())

    unguided = small.plain()
    for target in (look, drag):
        guided = small.sample(target, mode=mode, strength=3.0, iterations=4)
        assert distance(guided) < distance(unguided)


@pytest.mark.parametrize("mode", ["fast", "reference"])
def test_strength_zero_is_ksampler_bit_for_bit(small, mode):
    assert torch.equal(small.sample(small.target(), strength=0.0, mode=mode), small.plain())


def test_a_target_whose_range_no_step_lies_in_is_ksampler_bit_for_bit(small):
    target = small.target(start_percent=0.41, end_percent=0.42)
    assert torch.equal(small.sample(target, steps=4), small.plain(steps=4))


def test_a_seed_reproduces(small):
    a, b = (small.sample(small.target(), sampler_name="euler_ancestral") for _ in range(2))
    assert torch.equal(a, b)


def test_sdxl_shape_with_pooled_conditioning(comfyui):
    """A UNet of SDXL's shape: 9 maps, emb before the label embedding, weights in ComfyUI's y."""
    from small_models import sdxl_model

    model = sdxl_model()
    backbone = engine("comfy_host.loaded.model").backbone_of(model)
    heads = engine("heads")
    with torch.inference_mode(False):
        network = heads.AggregationNetwork(
            backbone.channels, projection_channels=128, emb_width=backbone.emb_width, output_channels=3
        ).requires_grad_(False)
    spec = heads.HeadSpec(kind="spatial", feature_channels=backbone.channels)
    head = heads.ReadoutHead(network=network, spec=spec, name="random")
    generator = torch.Generator().manual_seed(0)

    def words():
        return [[torch.randn(1, 8, 64, generator=generator), {"pooled_output": torch.randn(1, 1280, generator=generator)}]]

    control = torch.rand(1, 16, 16, 3, generator=generator)
    target = node("RG_ReadoutTarget", head=head, weight=1.0, start_percent=0.0, end_percent=0.6, image=control)
    inputs = {
        "model": model, "seed": 5, "steps": 6, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal",
        "positive": words(), "negative": words(), "latent_image": {"samples": torch.zeros(1, 4, 16, 16)}, "denoise": 1.0,
    }  # fmt: skip
    import nodes

    unguided = nodes.KSampler().sample(**inputs)[0]["samples"]
    more = {"target": target, "strength": 2.0, "mode": "fast", "iterations": 1, "source_cfg": -1.0}
    guided = node("RG_ReadoutGuidedKSampler", **inputs, **more)["samples"]

    def error(samples):
        readout, _ = node("RG_ReadOut", model=model, head=head, latent={"samples": samples}, noise_percent=0.1, seed=0,
                          positive=inputs["positive"])  # fmt: skip
        return float((readout - (control.permute(0, 3, 1, 2) - 0.5)).square().mean())

    assert error(guided) < error(unguided)
