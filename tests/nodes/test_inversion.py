"""Inversion: the latent found is what the sampler makes the picture from, to the error that is reported."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from comfyui_host import engine, node

STEPS = 6


@pytest.fixture
def kit(comfyui):
    """The demo model: model, latent (of a rendered picture), positive, negative; invert(...), sample(latent, ...)."""
    import nodes

    model, clip, vae = node("RG_LoadDemoModel")
    picture = node("RG_DemoScene", seed=3, count=1, figure_only=True)[0]
    return kit_of(
        model,
        nodes.VAEEncode().encode(vae, picture)[0],
        nodes.CLIPTextEncode().encode(clip, "a red figure, grey wall")[0],
        nodes.CLIPTextEncode().encode(clip, "")[0],
    )


def kit_of(model, latent, positive, negative):
    def invert(latent=latent, **settings):
        given = {"steps": STEPS, "scheduler": "normal", "positive": positive, **settings}
        return engine("comfy_host.edits.inversion").invert_latent(model, latent, **given)

    def sample(latent, target=None, strength=2.0, **settings):
        given = {
            "seed": 1, "steps": STEPS, "cfg": 1.0, "sampler_name": "euler", "scheduler": "normal", "positive": positive,
            "negative": negative, "denoise": 1.0, **settings,
        }  # fmt: skip
        guidance = engine("guidance").GuidanceSettings(strength=strength)
        return engine("comfy_host.guided.sampling").guided_ksampler(model, target, guidance, latent=latent, **given)

    return SimpleNamespace(model=model, latent=latent, positive=positive, negative=negative, invert=invert, sample=sample)


def far_from(samples, latent):
    """RMS of the difference, as a part of the latent's."""
    return float((samples - latent).square().mean().sqrt() / latent.square().mean().sqrt())


def refused(match):
    return pytest.raises(engine("errors").TargetError, match=match)


@pytest.mark.parametrize("settings", [{}, {"scheduler": "karras"}, {"cfg": 2.0}], ids=["normal", "karras", "cfg 2"])
def test_the_way_back_loses_what_is_reported_and_refinements_lose_less(kit, settings):
    negative = {"negative": kit.negative} if "cfg" in settings else {}
    errors = []
    for refinements in (0, 4):
        inverted, error = kit.invert(refinements=refinements, **negative, **settings)
        back = kit.sample(inverted, **settings)["samples"]
        assert far_from(back, kit.latent["samples"]) == pytest.approx(error, rel=1e-2, abs=1e-4)
        errors.append(error)
    assert errors[1] < errors[0]


def test_with_enough_steps_and_refinements_a_picture_comes_back(kit):
    inverted, error = kit.invert(steps=12, refinements=8)
    assert error < 0.02
    for sampler in ("euler", "ddim"):
        back = kit.sample(inverted, steps=12, sampler_name=sampler)["samples"]
        assert far_from(back, kit.latent["samples"]) < 0.02


def test_the_node_gives_the_latent_and_the_error(kit):
    inputs = {"steps": STEPS, "scheduler": "normal", "cfg": 1.0, "positive": kit.positive, "refinements": 1}
    inverted, error = node("RG_InvertLatent", model=kit.model, latent=kit.latent, **inputs)
    same, same_error = kit.invert(refinements=1)
    assert torch.equal(inverted["samples"], same["samples"])
    assert error == same_error


def test_a_batch_is_its_pictures(kit):
    other = torch.randn(kit.latent["samples"].shape, generator=torch.Generator().manual_seed(0))
    both, _ = kit.invert({"samples": torch.cat([kit.latent["samples"], other])}, refinements=1)
    alone, _ = kit.invert(refinements=1)
    assert far_from(both["samples"][:1], alone["samples"]) < 1e-3


def test_the_seed_and_strength_0_change_nothing(kit):
    inverted, _ = kit.invert(refinements=0)
    back = kit.sample(inverted)["samples"]
    assert torch.equal(kit.sample(inverted, seed=2)["samples"], back)
    target = engine("guidance").Target(head=demo_head(kit.model), drags=(engine("types").Drag((0.3, 0.3), (0.6, 0.6)),))
    assert torch.equal(kit.sample(inverted, target, strength=0.0)["samples"], back)


def test_only_the_inverted_latent_is_marked_as_such(kit):
    mark = engine("comfy_host.edits.inversion").INVERTED
    inverted, error = kit.invert(refinements=0)
    assert inverted[mark].error == error
    assert mark not in kit.latent
    assert mark not in kit.sample(inverted)


def test_a_picture_that_other_nodes_made_of_it_is_sampled_as_any(kit):
    mark = engine("comfy_host.edits.inversion").INVERTED
    inverted, _ = kit.invert(refinements=0)
    painted = kit.sample(inverted)
    marked = kit.sample({**painted, mark: inverted[mark]}, denoise=0.5)  # ComfyUI's own samplers keep what they don't know
    assert torch.equal(marked["samples"], kit.sample(painted, denoise=0.5)["samples"])
    assert mark not in marked


def test_other_settings_than_the_inversion_s_are_refused_or_warned_of(kit, caplog):
    inverted, _ = kit.invert(refinements=0)
    with refused("use steps 6, scheduler normal, denoise 1"):
        kit.sample(inverted, denoise=0.5)
    with refused("inverted to noise level .* sampling would begin at .*: use steps 6"):
        kit.sample(inverted, scheduler="ddim_uniform")  # begins below the model's first sigma
    kit.sample(inverted)
    assert not caplog.records
    for others in ({"steps": 7}, {"scheduler": "karras"}, {"cfg": 2.0}, {"sampler_name": "euler_ancestral"}):
        caplog.clear()
        kit.sample(inverted, **others)
        assert "inverted for euler, 6 steps, normal, cfg 1" in caplog.text


def test_a_noise_mask_on_an_inverted_latent_is_refused(kit):
    inverted, _ = kit.invert(refinements=0)
    with refused("remove the noise mask"):
        kit.sample({**inverted, "noise_mask": torch.ones(1, 1, 16, 16)})


def test_what_cannot_be_inverted_is_refused(kit):
    with refused("the latent to invert is empty: connect a picture"):
        kit.invert({"samples": torch.zeros(1, 8, 16, 16)})
    with refused("cfg is 2, which needs a negative prompt"):
        kit.invert(cfg=2.0)


def test_without_a_prompt_it_is_the_empty_one(kit):
    inverted, error = kit.invert(positive=None, refinements=1)
    assert torch.isfinite(inverted["samples"]).all()
    assert error < 1


def test_an_interrupt_leaves_the_model_and_the_latent_as_they_were(kit):
    import comfy.model_management

    network, seen = kit.model.model.diffusion_model, []
    weights = {name: weight.clone() for name, weight in network.state_dict().items()}
    before, options = kit.latent["samples"].clone(), dict(kit.model.model_options)

    def stop(*_):
        seen.append(1)
        if len(seen) == 3:
            comfy.model_management.interrupt_current_processing(True)

    handle = network.register_forward_hook(stop)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        kit.invert()
    handle.remove()
    assert len(seen) == 3
    assert all(torch.equal(weight, weights[name]) for name, weight in network.state_dict().items())
    assert kit.model.model_options == options
    assert torch.equal(kit.latent["samples"], before)
    comfy.model_management.throw_exception_if_processing_interrupted()  # no longer pending


# Another model: it predicts eps, with random weights

EPS_STEPS = 10


@pytest.fixture
def eps(small):
    """The parity kit's network, its prediction scaled down: as it is, it makes pictures hundreds of times as large as its
    noise, and nothing leads back from them."""
    small.model.set_model_unet_function_wrapper(scaled_eps)
    latent = {"samples": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))}
    kit = kit_of(small.model, latent, small.positive, small.negative)
    kit.small = small
    return kit


def scaled_eps(run, given):
    """eps = (x - denoised) / sigma, a fifth of the network's."""
    x, denoised = given["input"], run(given["input"], given["timestep"], **given["c"])
    return x - 0.2 * (x - denoised)


def test_it_works_with_a_model_that_predicts_eps(eps):
    errors = []
    for refinements in (0, 6):
        inverted, error = eps.invert(steps=EPS_STEPS, refinements=refinements)
        back = eps.sample(inverted, steps=EPS_STEPS)["samples"]
        assert far_from(back, eps.latent["samples"]) == pytest.approx(error, rel=1e-2, abs=1e-4)
        errors.append(error)
    assert errors[1] < errors[0]


def drag(eps):
    drags = (engine("types").Drag((0.3, 0.3), (0.7, 0.6)),)
    return engine("guidance").Target(head=eps.small.head("correspondence"), drags=drags, end_percent=0.6)


def test_a_drag_on_an_inverted_latent_has_a_source_and_moves(eps, monkeypatch):
    monkeypatch.setattr(engine("comfy_host.guided.model"), "SOURCES", engine("comfy_host.guided.source_pass").SourcePasses())
    inverted, _ = eps.invert(steps=EPS_STEPS, refinements=1)
    seen = []
    eps.model.model.diffusion_model.register_forward_pre_hook(lambda *_: seen.append(1))
    calls = []
    for target in (None, drag(eps), drag(eps)):
        seen.clear()
        out = eps.sample(inverted, target, steps=EPS_STEPS)["samples"]
        calls.append(len(seen))
        if target is None:
            unguided = out
        else:
            assert torch.isfinite(out).all()
            assert far_from(out, unguided) > 0.1
    assert calls[0] == EPS_STEPS
    assert calls[1] >= 2 * EPS_STEPS  # the source, then the guided pass


def demo_head(model):
    """A correspondence head with random weights for the demo model."""
    heads = engine("heads")
    backbone = engine("comfy_host.loaded.model").backbone_of(model)
    with torch.inference_mode(False):
        network = heads.AggregationNetwork(
            backbone.channels, projection_channels=128, emb_width=backbone.emb_width, output_channels=0
        ).requires_grad_(False)
    spec = heads.HeadSpec(kind="correspondence", feature_channels=backbone.channels)
    return heads.ReadoutHead(network=network, spec=spec, name="random")


def test_a_drag_on_the_inverted_picture_of_the_demo_model_moves_it(kit):
    inverted, _ = kit.invert(refinements=2)
    target = engine("guidance").Target(head=demo_head(kit.model), drags=(engine("types").Drag((0.3, 0.3), (0.6, 0.6)),))
    moved, back = kit.sample(inverted, target)["samples"], kit.sample(inverted)["samples"]
    assert torch.isfinite(moved).all()
    assert far_from(moved, back) > 0.05


def test_a_reference_beside_an_inverted_latent_is_read_with_noise_of_the_seed(eps):
    """The inverted latent is the noise of the picture, so none is added to it; a reference still needs some."""
    inverted, _ = eps.invert(steps=EPS_STEPS, refinements=0)
    reference = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    look = engine("guidance").Target(head=eps.small.head("appearance"), reference_latent=reference, end_percent=0.6)
    sigma = float(inverted[engine("comfy_host.edits.inversion").INVERTED].sigma)
    inputs = []
    eps.model.model.diffusion_model.register_forward_pre_hook(lambda _, given: inputs.append(given[0].clone()))

    def noise(seed):
        inputs.clear()
        out = eps.sample(inverted, look, steps=EPS_STEPS, seed=seed)["samples"]
        assert torch.isfinite(out).all()
        scaled = eps.model.model.process_latent_in(reference)
        return (inputs[0] * (1 + sigma**2) ** 0.5 - scaled) / sigma  # the reference is read first

    one, again, other = noise(1), noise(1), noise(2)
    assert 0.8 < float(one.std()) < 1.2
    assert torch.equal(one, again)
    assert not torch.allclose(one, other, atol=0.1)
