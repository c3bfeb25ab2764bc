"""Optimize Noise refuses bad input before it samples, in words that say what to do."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from comfyui_host import engine, node
from small_models import PARITY


@pytest.fixture
def demo(comfyui, monkeypatch):
    """optimize(**inputs) on the demo model; calls, of its network."""
    import nodes

    model, clip, vae = node("RG_LoadDemoModel")
    calls = []
    model.model.diffusion_model.register_forward_pre_hook(lambda *_: calls.append(1))
    given = {
        "model": model, "seed": 2, "steps": 2, "cfg": 2.0, "sampler_name": "euler", "scheduler": "normal",
        "positive": nodes.CLIPTextEncode().encode(clip, "a red figure, grey wall")[0],
        "negative": nodes.CLIPTextEncode().encode(clip, "")[0],
        "latent_image": {"samples": torch.zeros(1, 4, 16, 16)}, "denoise": 1.0, "vae": vae,
        "loss": node("RG_PictureLoss", kind="symmetry", weight=1.0), "updates": 2,
    }  # fmt: skip
    return SimpleNamespace(
        model=model, vae=vae, calls=calls, given=given, optimize=lambda **new: node("RG_OptimizeNoise", **{**given, **new})
    )


def refused(match, error="OptimizationError"):
    return pytest.raises(getattr(engine("errors"), error), match=match)


def target(name="demo_pose.safetensors", image=None, **inputs):
    head = node("RG_LoadReadoutHead", head_name=name, kind="auto")
    image = torch.rand(1, 64, 64, 3) if image is None else image
    given = {"weight": 1.0, "start_percent": 0.0, "end_percent": 0.5, "image": image, **inputs}
    return node("RG_ReadoutTarget", head=head, **given)


def test_a_run_that_nothing_is_wrong_with(demo):
    demo.optimize()
    assert demo.calls


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"sampler_name": "deis"}, "sampler 'deis' can't be optimized through.*Use one of euler"),
        ({"sampler_name": "dpm_adaptive"}, "sampler 'dpm_adaptive' can't be optimized through"),
        ({"sampler_name": "heun", "couple": "edict"}, "set sampler_name to euler or ddim, or couple to none"),
        ({"loss": None}, "nothing to optimize for: connect a loss .* or a target"),
        ({"latent_image": {"samples": torch.zeros(1, 8, 2, 16, 16)}}, "only pictures are optimized, no video"),
        ({"noises": "all"}, "'euler' draws no noise on its way.*set noises to first"),
        ({"noises": "all", "sampler_name": "lcm", "steps": 1}, "in 1 steps the sampler 'lcm' draws no noise"),
        ({"noises": "all", "couple": "edict"}, "sampled without noise on the way: set noises to first"),
        ({"denoise": 0.0}, "denoise 0 nothing is sampled"),
        ({"steps": 0}, "steps 0 and updates 2 make no picture"),
        ({"strength": float("nan")}, "strength is nan: give 0 or more"),
        (
            {"couple": "edict", "latent_image": {"samples": torch.zeros(1, 4, 16, 16), "noise_mask": torch.ones(1, 16, 16)}},
            "edict.* know no noise mask",
        ),
    ],
    ids=lambda given: next(iter(given)) if isinstance(given, dict) else None,
)
def test_settings_that_can_not_be(demo, given, words):
    with refused(words):
        demo.optimize(**given)
    assert not demo.calls


def test_losses_that_count_for_nothing(demo):
    with refused("every loss has weight 0"):
        demo.optimize(loss=node("RG_PictureLoss", kind="symmetry", weight=0.0))
    with refused("likeness compares with a picture: connect image"):
        node("RG_PictureLoss", kind="likeness", weight=1.0)
    with refused("the mask is black"):
        node("RG_PictureLoss", kind="palette", weight=1.0, image=torch.rand(1, 8, 8, 3), mask=torch.zeros(1, 8, 8))
    three = node("RG_PictureLoss", kind="likeness", weight=1.0, image=torch.rand(3, 8, 8, 3))
    with refused("'likeness' compares with a batch of 3 and 1 picture is being made"):
        demo.optimize(loss=three)
    assert not demo.calls


def test_a_vae_of_another_model(demo):
    vae = SimpleNamespace(latent_channels=4)
    with refused("vae takes latents of 4 channels and the model makes 8"):
        demo.optimize(vae=vae)
    assert not demo.calls


def test_a_vae_that_makes_no_pictures(demo, monkeypatch):
    monkeypatch.setattr(demo.vae.first_stage_model, "decode", lambda latent: torch.zeros(1, 3, 2, 8, 8))
    with refused("video, audio and 3D are not optimized"):
        demo.optimize()


def test_a_guided_model(demo):
    settings = {"strength": 1.0, "mode": "fast", "iterations": 1, "source_cfg": -1.0}
    guided = node("RG_ApplyReadoutGuidance", model=demo.model, target=target(), **settings)
    with refused("guided by Apply Readout Guidance.*its target to target"):
        demo.optimize(model=guided)
    assert not demo.calls


def test_targets_that_do_not_fit(demo):
    head = engine("heads").load_head(PARITY / "head_spatial.pt")
    other = node(
        "RG_ReadoutTarget", head=head, weight=1.0, start_percent=0.0, end_percent=0.5, image=torch.rand(1, 8, 8, 3)
    )  # fmt: skip
    with refused("head", "BackboneError"):
        demo.optimize(target=other)
    points = node("RG_DragPoints", points='{"version": 1, "drags": [{"from": [0.5, 0.5], "to": [0.6, 0.5]}]}', frames=3)
    with refused("drags in several frames"):
        demo.optimize(target=target("demo_correspondence.safetensors", image=None, drag_points=points[0]))
    with refused("batch of 3", "TargetError"):
        demo.optimize(target=target(image=torch.rand(3, 64, 64, 3)))
    assert not demo.calls


def test_an_inverted_latent_is_sampled_as_a_whole(demo):
    noise = demo.optimize(updates=0)[1]
    demo.calls.clear()
    for changed in ({"denoise": 0.5}, {"latent_image": {**noise, "noise_mask": torch.ones(1, 16, 16)}}):
        with refused("an inverted latent is sampled as a whole"):
            demo.optimize(**{"latent_image": noise, **changed})
    assert not demo.calls


def test_an_inverted_latent_of_another_noise_level(demo):
    noise = demo.optimize(updates=0)[1]
    demo.calls.clear()
    with refused("was inverted to noise level"):
        demo.optimize(latent_image=noise, scheduler="ddim_uniform", steps=7)
    assert not demo.calls


def test_a_loss_without_a_gradient_says_so(demo):
    losses = engine("optimization")
    flat = losses.PictureLoss(name="flat", measure=lambda images, _: 0.0 * images.flatten(1).sum(1))
    with refused("the loss has no gradient here"):
        demo.optimize(loss=flat)
    apart = losses.PictureLoss(name="apart", measure=lambda images, _: images.detach().flatten(1).mean(1))
    with refused("the loss does not depend on the picture"):
        demo.optimize(loss=apart)


def test_a_sampler_that_gives_no_gradient_in_this_comfyui(demo, monkeypatch):
    samplers = engine("comfy_host.optimized.samplers")
    monkeypatch.setattr(samplers, "RIGHT", ("euler", "dpm_fast"))
    with refused("'dpm_fast' gave no gradient in this ComfyUI"):
        demo.optimize(sampler_name="dpm_fast")


def test_names_of_files_are_checked_before_the_graph_runs(comfyui):
    import nodes

    mapping = nodes.NODE_CLASS_MAPPINGS
    assert "no file named 'none.pth'" in mapping["RG_AestheticLoss"].validate_inputs(head="none.pth")
    assert "no file named '../x'" in mapping["RG_ClassifierLoss"].validate_inputs(classifier="../x")
