"""A guided model is guided wherever it goes: any sampler node, passes of other sizes, parts of a picture."""

from __future__ import annotations

import itertools
import json
import logging

import pytest
import torch
from comfyui_host import engine, node

APPLY = {"strength": 2.0, "mode": "fast", "iterations": 1, "source_cfg": -1.0}


@pytest.fixture
def said(caplog):
    """What the log was told: said() gives the lines so far."""
    caplog.set_level(logging.INFO, logger="readout_guidance")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "readout_guidance"]


def apply(small, target=None, model=None, **settings):
    given = {"model": model or small.model, "target": target or small.target(), **APPLY, **settings}
    return node("RG_ApplyReadoutGuidance", **given)


def closer(small, guided, unguided) -> bool:
    return bool((small.control_error(guided) < small.control_error(unguided)).all())


def test_the_guided_ksampler_is_ksampler_with_the_guided_model(small):
    assert torch.equal(small.plain(model=apply(small)), small.sample(small.target()))


def test_strength_zero_is_the_model_as_it_was(small):
    assert torch.equal(small.plain(model=apply(small, strength=0.0)), small.plain())


def test_the_model_that_was_given_is_not_guided(small):
    unguided = small.plain()
    apply(small)
    assert torch.equal(small.plain(), unguided)


@pytest.mark.parametrize(("settings", "share"), [({"feature_steps": 1}, 1e-4), ({}, 0.05)], ids=["gradient", "default"])
def test_two_parts_of_a_schedule_are_guided_as_the_whole(small, settings, share):
    """KSamplerAdvanced: the first three steps, its noise left in, and then the rest. By default each part begins with the
    negative prompt, which the whole keeps from the step before."""
    import nodes

    model = apply(small, small.target(end_percent=0.8), strength=1.0, **settings)

    def advanced(latent, start, end, noise):
        return nodes.KSamplerAdvanced().sample(
            model, noise, 5, 6, 4.0, "euler", "normal", small.positive, small.negative, latent, start, end,
            "enable" if end < 6 else "disable",
        )[0]  # fmt: skip

    halves = advanced(advanced(small.latent, 0, 3, "enable"), 3, 6, "disable")["samples"]
    whole = small.plain(model=model)
    effect = (whole - small.plain()).norm()
    assert (halves - whole).norm() < share * effect


def test_samplercustom(small):
    import comfy.samplers
    from comfy_extras.nodes_custom_sampler import SamplerCustom as custom

    sampler = comfy.samplers.sampler_object("euler")
    sigmas = comfy.samplers.calculate_sigmas(small.model.get_model_object("model_sampling"), "normal", 6)
    inputs = (apply(small), True, 5, 4.0, small.positive, small.negative, sampler, sigmas, small.latent)
    guided = custom.execute(*inputs).result[0] if hasattr(custom, "execute") else custom().sample(*inputs)[0]
    torch.testing.assert_close(guided["samples"], small.plain(model=apply(small)))


def test_a_pass_of_another_size(small, said):
    model, larger = apply(small, small.target(end_percent=1.0)), torch.zeros(1, 4, 24, 24)
    first = small.plain(model=model)
    resized = {"samples": torch.nn.functional.interpolate(first, (24, 24))}
    guided = small.plain(model=model, latent_image=resized, denoise=0.6)
    unguided = small.plain(latent_image=resized, denoise=0.6)
    assert guided.shape == larger.shape
    control = small.control.repeat_interleave(2, 1).repeat_interleave(2, 2)
    del control
    assert not torch.allclose(guided, unguided, atol=1e-2)
    assert sum("guided" in line and "loss" in line for line in said()) == 2


def test_guided_twice_alike_is_one_chain(small):
    first, second = small.target(weight=2.0), small.target("appearance", reference_latent={"samples": small.plain(seed=7)})
    twice = apply(small, second, apply(small, first))
    chain = node(
        "RG_ReadoutTarget", head=second.head, weight=1.0, start_percent=0.0, end_percent=0.6, previous=first,
        reference_latent={"samples": second.reference_latent},
    )  # fmt: skip
    torch.testing.assert_close(small.plain(model=twice), small.plain(model=apply(small, chain)))


@pytest.mark.parametrize(
    "second", [{"strength": 0.7}, {"mode": "reference", "iterations": 3}, {"mode": "norm_ratio"}], ids=str
)
def test_guided_twice_otherwise_follows_both(small, second):
    """Each by itself: without strength, either leaves the other's picture."""
    other = small.target(image=1 - small.control, end_percent=0.4)
    exactly = {"keep_negative": 0, "feature_steps": 1}
    second = {**exactly, **second}
    model = apply(small, small.target(), **exactly)
    both = small.plain(model=apply(small, other, model, **second))
    one, alone = small.plain(model=model), small.plain(model=apply(small, other, **second))
    assert torch.isfinite(both).all()
    assert not torch.allclose(both, one, atol=1e-2)
    assert not torch.allclose(both, alone, atol=1e-2)
    weak = small.plain(model=apply(small, other, model, **{**second, "strength": 1e-6}))
    assert (weak - one).norm() < 0.05 * (both - one).norm()


def test_a_source_beside_other_guidance_is_unguided(small, monkeypatch):
    steps = []
    source_step = engine("comfy_host.guided.model").source_step

    def noted(run, planned, call):
        steps.append(call.x.clone())
        return source_step(run, planned, call)

    monkeypatch.setattr(engine("comfy_host.guided.model"), "source_step", noted)

    def forget():
        sources = engine("comfy_host.guided.source_pass").SourcePasses()
        monkeypatch.setattr(engine("comfy_host.guided.model"), "SOURCES", sources)

    points, _ = node("RG_DragPoints", points=json.dumps({"version": 1, "drags": [{"from": [0.3, 0.3], "to": [0.7, 0.6]}]}))
    drag = small.target("correspondence", drag_points=points)
    forget()
    small.plain(model=apply(small, drag, strength=1.5))
    alone, steps[:] = list(steps), []
    forget()
    small.plain(model=apply(small, small.target(), apply(small, drag, strength=1.5)))
    assert len(steps) == len(alone)
    for ours, theirs in zip(steps, alone, strict=True):
        assert torch.equal(ours, theirs)


def tiled(model, size=8):
    """Another node that runs the model on tiles, all in one call, as tiled diffusions do."""
    model = model.clone()

    def wrapper(apply_model, args):
        x, t, c = args["input"], args["timestep"], args["c"]
        out = torch.zeros_like(x)
        places = [(top, left) for top in range(0, x.shape[-2], size) for left in range(0, x.shape[-1], size)]
        tiles = torch.cat([x[..., top : top + size, left : left + size] for top, left in places])
        more = {k: v.repeat(len(places), *[1] * (v.ndim - 1)) if isinstance(v, torch.Tensor) else v for k, v in c.items()}
        parts = apply_model(tiles, t.repeat(len(places)), **more).chunk(len(places))
        for (top, left), part in zip(places, parts, strict=True):
            out[..., top : top + size, left : left + size] = part
        return out

    model.set_model_unet_function_wrapper(wrapper)
    return model


@pytest.mark.parametrize("mode", ["fast", "reference", "norm_ratio"])
def test_tiles_follow_their_own_part_of_the_control(small, mode, said):
    """Only one quarter's control is asked for; it is that quarter which moves."""
    mask = torch.zeros(1, 16, 16)
    mask[:, :8, 8:] = 1
    model = tiled(small.model)
    guided = small.plain(model=apply(small, small.target(mask=mask), model, mode=mode, iterations=2))
    effect = (guided - small.plain(model=model)).square()
    inside = effect[..., :8, 8:].mean()
    others = [effect[..., :8, :8].mean(), effect[..., 8:, :8].mean(), effect[..., 8:, 8:].mean()]
    assert all(inside > 10 * other for other in others)  # tiles don't see each other, so only rounding is left
    assert not [line for line in said() if "no part" in line]


def test_regional_prompts_are_parts(small):
    words = small.positive[0][0]
    regions = [[words, {"area": (16, 8, 0, 0), "strength": 1.0}], [-words, {"area": (16, 8, 0, 8), "strength": 1.0}]]
    mask = torch.zeros(1, 16, 16)
    mask[:, :, 8:] = 1
    guided = small.sample(small.target(mask=mask), positive=regions, cfg=1.0)
    effect = (guided - small.plain(positive=regions, cfg=1.0)).square()
    assert effect[..., 8:].mean() > 10 * effect[..., :8].mean()


@pytest.mark.parametrize("mode", ["fast", "reference"])
def test_context_windows_with_a_control_for_each_picture(small, mode):
    """Core's windows over a batch: each picture is compared with its own control."""
    windows = pytest.importorskip("comfy.context_windows")
    model = small.model.clone()
    handler = windows.IndexListContextHandler(
        context_schedule=windows.get_matching_context_schedule("standard_static"),
        fuse_method=windows.get_matching_fuse_method("pyramid"), context_length=2, context_overlap=1, dim=0,
    )  # fmt: skip
    model.model_options["context_handler"] = handler
    latent, control = {"samples": torch.zeros(4, 4, 16, 16)}, torch.rand(4, 16, 16, 3)
    try:
        unguided = small.plain(model=model, latent_image=latent)
    except RuntimeError:
        pytest.skip("this ComfyUI's own windows fail on batches")
    target = small.target(image=control)
    guided = small.plain(model=apply(small, target, model, mode=mode, iterations=2), latent_image=latent)
    assert (small.control_error(guided, control) < small.control_error(unguided, control)).all()
    mixed = small.target(image=control[[1, 0, 3, 2]])
    other = small.plain(model=apply(small, mixed, model, mode=mode, iterations=2), latent_image=latent)
    assert (small.control_error(guided, control) < small.control_error(other, control)).all()


def test_a_model_that_is_enlarged_on_the_way_is_told_apart(small, said):
    model = small.model.clone()

    def enlarge(apply_model, args):
        x = torch.nn.functional.interpolate(args["input"], (24, 24))
        return torch.nn.functional.interpolate(apply_model(x, args["timestep"], **args["c"]), (16, 16))

    model.set_model_unet_function_wrapper(enlarge)
    unguided = small.plain(model=model)
    torch.testing.assert_close(small.plain(model=apply(small, model=model)), unguided, rtol=1e-3, atol=1e-3)
    (line,) = [line for line in said() if "24x24" in line]
    assert "no part of the one being made" in line


def test_prompts_that_start_later(small, said):
    """While no prompt is active there is nothing to read; the run goes on."""
    import nodes

    late = nodes.ConditioningSetTimestepRange().set_range(small.positive, 0.3, 1.0)[0]
    guided = small.sample(small.target(), positive=late, steps=10)
    assert torch.isfinite(guided).all()
    assert any("no prompt was active" in line for line in said())
    assert not torch.allclose(guided, small.plain(positive=late, steps=10), atol=1e-2)


def test_a_compiled_model(small):
    """Plain steps run what was compiled, guided steps the network as it was written."""
    import torch._dynamo
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    compiled, calls = small.model.clone(), []

    def backend(graph, inputs):
        def run(*args):
            calls.append(torch.is_grad_enabled())
            return graph.forward(*args)

        return run

    set_torch_compile_wrapper(compiled, backend=backend)
    guided = small.plain(model=apply(small, model=compiled), steps=3)
    torch.testing.assert_close(guided, small.plain(model=apply(small), steps=3), rtol=1e-2, atol=1e-2)
    assert calls
    assert not any(calls)
    torch._dynamo.reset()


def test_keyframes_of_strength_for_each_picture(small):
    keyframes, _ = node("RG_ReadoutKeyframes", keyframes=["0.0: 0, 1, 1"], interpolation=["linear"])
    latent = {"samples": torch.zeros(3, 4, 16, 16)}
    exactly = {"latent_image": latent, "keep_negative": 0, "feature_steps": 1}
    guided = small.sample(small.target(), **exactly, keyframes=keyframes)
    unguided, alike = small.plain(latent_image=latent), small.sample(small.target(), **exactly)
    torch.testing.assert_close(guided[:1], unguided[:1], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(guided[1:], alike[1:], rtol=1e-3, atol=1e-3)


def test_keyframes_of_nothing_are_ksampler_bit_for_bit(small, said):
    keyframes, _ = node("RG_ReadoutKeyframes", keyframes=["0: 0; 0.7: 0; 0.8: 1"], interpolation=["linear"])
    assert torch.equal(small.sample(small.target(), keyframes=keyframes), small.plain())
    assert torch.equal(small.sample(small.target(keyframes=keyframes)), small.plain())
    assert all("keyframes" in line for line in said() if "no step was guided" in line)


@pytest.mark.parametrize(
    ("target", "settings", "why"),
    [
        ({"end_percent": 0.5}, {"denoise": 0.4}, "raise end_percent"),
        ({"start_percent": 0.41, "end_percent": 0.42}, {}, "use more steps"),
    ],
    ids=["sampling begins after the range", "no step in the range"],
)
def test_a_run_without_a_guided_step_says_so_and_the_way_out(small, said, target, settings, why):
    latent = {"samples": small.plain()}
    small.sample(small.target(**target), latent_image=latent, **settings)
    (line,) = [line for line in said() if "no step was guided" in line]
    assert why in line


def test_the_line_after_a_run(small, said):
    small.sample(small.target())
    (line,) = [line for line in said() if "guided 3 of 6 steps" in line]
    assert "loss" in line
    assert "s added" in line


def test_moves_within_a_step_are_measured_where_they_are_made(small, monkeypatch):
    """All but a step's last one, which the sampler takes as it is, are shrunk with the noise by the sampler's step."""
    schedule, step = engine("guidance.schedule"), engine("comfy_host.guided.step")
    frame = engine("comfy_host.guided.frame").Frame
    made, planned = [], []
    move, one_pass_step = frame.move, step.one_pass_step
    monkeypatch.setattr(frame, "move", lambda self, by: [made.append(by.square().mean().sqrt().item()), move(self, by)][1])
    monkeypatch.setattr(
        engine("comfy_host.guided.model"), "one_pass_step",
        lambda run, plan, call: [planned.append((plan, len(made))), one_pass_step(run, plan, call)][1],
    )  # fmt: skip
    small.sample(small.target(), steps=4, scheduler="normal")
    (plan, before), *_ = planned
    assert plan.moves > 2
    within = made[before : before + plan.moves - 1]
    length = schedule.PATH_WHERE_MADE * plan.length / plan.moves * (1 + plan.sigma**2) ** 0.5
    assert within == pytest.approx([length] * (plan.moves - 1), rel=1e-3)


def test_a_loss_that_rises_is_said(small, said, monkeypatch):
    updates = engine("comfy_host.guided.step")
    monkeypatch.setattr(
        updates, "rms_step", lambda gradient, length: 40 * gradient / gradient.square().mean().sqrt() * length
    )
    small.sample(small.target())
    assert any("the loss rose" in line for line in said())


@pytest.mark.parametrize(("between", "iterations", "warned"), [(0, 1, False), (3, 1, True), (3, 2, False)])
def test_a_sampler_that_renews_its_noise_between_its_steps_is_named(small, said, between, iterations, warned):
    """Each step begins with so many calls at its own noise level, with nine tenths of the noise renewed at each."""
    import comfy.sample
    import comfy.samplers

    def sample(model, x, sigmas, extra_args=None, **_):
        for high, low in itertools.pairwise(sigmas):
            for _call in range(between):
                first = model(x, high * x.new_ones(len(x)), **extra_args)
                x = first + 0.3 * (x - first) + 0.91**0.5 * high * torch.randn_like(x)
            first = model(x, high * x.new_ones(len(x)), **extra_args)
            x = first + (x - first) * low / high
        return x

    comfy.sample.sample_custom(
        apply(small, iterations=iterations), torch.randn(small.latent["samples"].shape), 4.0,
        comfy.samplers.KSAMPLER(sample),
        comfy.samplers.calculate_sigmas(small.model.get_model_object("model_sampling"), "normal", 6),
        small.positive, small.negative, small.latent["samples"],
    )  # fmt: skip
    assert any("the sampler renews its noise several times a step" in line for line in said()) is warned


def test_a_crop_that_is_sampled_by_itself_follows_its_part(small):
    """Follow Crops, as detailers and tiled upscalers cut it: masks of the prompt, along with the picture."""
    picture = torch.rand(1, 128, 128, 3)
    (prompt, facts), *_ = node("RG_FollowCrops", positive=small.positive, image=picture)
    mask = facts["mask"]
    height, width = mask.shape[-2:]
    cut = mask[..., height // 2 :, : width // 2]
    marked = [[prompt, {**facts, "mask": cut}]]
    control = torch.rand(1, 32, 32, 3)
    model = apply(small, small.target(image=control), feature_steps=1)
    ours = small.plain(model=model, positive=marked)
    theirs = small.plain(model=apply(small, small.target(image=control[:, 16:, :16]), feature_steps=1))
    whole = small.plain(model=model)
    assert (ours - theirs).norm() < 0.1 * (theirs - small.plain()).norm()
    assert not torch.allclose(ours, whole, atol=1e-2)


SAMPLERS = ["euler", "dpmpp_2m", "euler_ancestral", "dpmpp_2m_sde", "uni_pc"]


@pytest.mark.parametrize("mode", ["fast", "reference", "norm_ratio"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_zero_terminal_snr(small, sampler, mode):
    """From sigma 4518 to 38 in one step, a move would grow 118 times in z if it were measured where it starts."""
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    model = ModelSamplingDiscrete().patch(small.model, "v_prediction", True)[0]
    settings = {"sampler_name": sampler, "scheduler": "sgm_uniform", "steps": 10}
    unguided = small.plain(model=model, **settings)
    guided = small.plain(model=apply(small, model=model, mode=mode, strength=1.0), **settings)
    assert guided.std() < 1.5 * unguided.std()


def test_a_cache_that_answers_in_the_networks_place(small):
    """As core's EasyCache: what it kept, an inference tensor, is added to the input, and the network does not run."""
    from comfy.patcher_extension import WrappersMP

    model, kept = small.model.clone(), []

    def cache(executor, x, *args, **kwargs):
        if kept and len(kept) % 2:
            kept.append(kept[0])
            return x + kept[0][: len(x)]
        out = executor(x, *args, **kwargs)
        kept.append((out - x).detach().clone() if out.is_inference() else torch.zeros_like(out))
        return out

    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "cache", cache)
    guided = small.plain(model=apply(small, model=model), steps=11)
    assert torch.isfinite(guided).all()
    kept.clear()
    assert not torch.allclose(guided, small.plain(model=model, steps=11), atol=1e-2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"strength": -1.0}, "strength is -1.0: it must be 0 or more"),
        ({"mode": "slow"}, "mode 'slow' is unknown"),
        ({"iterations": 0}, "iterations is 0: it must be 1 or more"),
    ],
    ids=["strength", "mode", "iterations"],
)
def test_bad_settings_are_refused_before_anything_runs(small, given, message):
    with pytest.raises(ValueError, match=message):
        apply(small, **given)


def test_drags_in_frames_are_refused(small):
    points, _ = node(
        "RG_DragPoints", points=json.dumps({"version": 1, "drags": [{"from": [0.3, 0.3], "to": [0.7, 0.6]}]}), frames=3
    )
    with pytest.raises(ValueError, match="set frames of Drag Points to 1 for a guider, or a guided model"):
        apply(small, small.target("correspondence", drag_points=points))


def test_keyframes_for_another_number_of_pictures_are_refused_before_sampling(small):
    keyframes, _ = node("RG_ReadoutKeyframes", keyframes=["0.0: 1, 1, 1"], interpolation=["linear"])
    for model in (apply(small, keyframes=keyframes), apply(small, small.target(keyframes=keyframes))):
        with pytest.raises(ValueError, match="has 3 values but 1 picture is being made: give one value, or one for each"):
            small.plain(model=model)
