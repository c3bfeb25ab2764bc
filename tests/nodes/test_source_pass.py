"""A source pass is run once for all drags on a picture, and never used for another picture."""

from __future__ import annotations

import contextlib
import functools
from types import SimpleNamespace

import pytest
import torch
from comfyui_host import engine
from small_models import parity_model

HERE, THERE = ((0.3, 0.3), (0.7, 0.6)), ((0.6, 0.2), (0.2, 0.8))


@pytest.fixture
def kit(small):
    """small, and: head; drag(arrow, ...), a target; draw(target, ...) -> latent; calls(), of the network in the last draw;
    forgotten(), a scope without
    the passes kept so far."""
    guided_model = engine("comfy_host.guided.model")
    kit = SimpleNamespace(small=small, model=small.model, head=small.head("correspondence"))
    seen = []

    def drag(arrow=HERE, **inputs):
        drags = (engine("types").Drag(*arrow),)
        return engine("guidance").Target(**{"head": kit.head, "drags": drags, "end_percent": 0.6, **inputs})

    def draw(target, **inputs):
        seen.clear()
        network = inputs.get("model", kit.model).model.diffusion_model
        handle = network.register_forward_pre_hook(lambda *_: seen.append(1))
        try:
            return small.sample(target, **{"latent_image": empty(), "steps": 3, "model": kit.model, **inputs})
        finally:
            handle.remove()

    @contextlib.contextmanager
    def forgotten():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(guided_model, "SOURCES", engine("comfy_host.guided.source_pass").SourcePasses())
            yield

    kit.drag, kit.draw, kit.forgotten, kit.calls = drag, draw, forgotten, lambda: len(seen)
    with forgotten():
        yield kit


def empty(*size, batch=1):
    return {"samples": torch.zeros(batch, 4, *(size or (8, 8)))}


def is_kept(kit, arrow=THERE, **change) -> bool:
    """Whether the pass of an earlier drag serves a drag with ``change``; the result must be that of a pass of its own."""
    target, inputs = change.pop("target", {}), change
    now = kit.draw(kit.drag(arrow, **target), **inputs)
    calls = kit.calls()
    with kit.forgotten():
        fresh = kit.draw(kit.drag(arrow, **target), **inputs)
    assert torch.equal(now, fresh)
    assert calls <= kit.calls()
    return calls < kit.calls()


@pytest.mark.parametrize(
    ("sampler", "mode"),
    [
        ("euler", "fast"),
        ("euler_ancestral", "fast"),
        ("euler_ancestral", "reference"),
        ("dpmpp_2s_ancestral", "fast"),
        ("dpmpp_sde", "fast"),
        ("lcm", "fast"),
    ],
)
def test_the_second_drag_costs_one_plain_pass_less_and_gives_the_same_picture(kit, sampler, mode):
    settings = {"sampler_name": sampler, "mode": mode}
    kit.draw(None, **settings)
    plain = kit.calls()
    first = kit.draw(kit.drag(HERE), **settings)
    calls = kit.calls()
    second = kit.draw(kit.drag(THERE), **settings)
    assert kit.calls() == calls - plain
    with kit.forgotten():
        assert torch.equal(second, kit.draw(kit.drag(THERE), **settings))
    assert not torch.equal(first, second)


def test_what_does_not_touch_the_source_may_change(kit):
    mask = torch.zeros(1, 8, 8)
    mask[:, :, 2:] = 1
    kit.draw(kit.drag())
    for change in ({"strength": 3.0}, {"target": {"weight": 0.5, "mask": mask}}):
        assert is_kept(kit, **change)
    kit.draw(kit.drag(), source_cfg=3.0)
    assert is_kept(kit, source_cfg=3.0, cfg=6.0)


def test_it_is_the_same_source_when_everything_was_made_anew(kit):
    def anew(prompt):
        return [[words.clone(), dict(more)] for words, more in prompt]

    kit.draw(kit.drag())
    assert is_kept(kit, model=kit.model.clone(), positive=anew(kit.small.positive), negative=anew(kit.small.negative))


def test_a_guider_uses_the_source_of_the_sampler_node(kit):
    import comfy.sample
    import comfy.samplers

    by_node = kit.draw(kit.drag(THERE))
    settings = engine("guidance").GuidanceSettings(strength=2.0)
    small, latent = kit.small, empty()["samples"]
    guider = engine("comfy_host.guided.sampling").readout_guider(
        kit.model, small.positive, small.negative, 4.0, kit.drag(THERE), settings
    )
    sigmas = comfy.samplers.calculate_sigmas(kit.model.get_model_object("model_sampling"), "normal", 3)
    reports = []
    noise = comfy.sample.prepare_noise(latent, 5)
    out = guider.sample(
        noise, latent, comfy.samplers.sampler_object("euler"), sigmas, callback=lambda *a: reports.append(a[3]), seed=5
    )
    assert torch.equal(out, by_node)
    assert reports == [3, 3, 3]  # one pass of three steps


CHANGES = {
    "seed": {"seed": 6},
    "cfg": {"cfg": 5.0},
    "source_cfg": {"source_cfg": 1.0},
    "sampler": {"sampler_name": "heun"},
    "scheduler": {"scheduler": "karras"},
    "steps": {"steps": 4},
    "denoise": {"denoise": 0.5},
    "mode": {"mode": "reference"},
    "end of the range": {"target": {"end_percent": 0.3}},
    "start of the range": {"target": {"start_percent": 0.2}},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_another_setting_has_its_own_source(kit, change):
    kit.draw(kit.drag())
    assert not is_kept(kit, **change)


@pytest.mark.parametrize("which", ["positive", "negative"])
def test_another_prompt_has_its_own_source(kit, which):
    ((words, _),) = getattr(kit.small, which)
    once_more = words.clone()
    once_more[0, 0, 0] += 0.1
    kit.draw(kit.drag())
    for prompt in ([[once_more, {}]], [[words, {"strength": 0.5}]]):
        assert not is_kept(kit, **{which: prompt})


def test_another_size_or_batch_has_its_own_source(kit):
    kit.draw(kit.drag())
    assert not is_kept(kit, latent_image=empty(8, 16))
    assert not is_kept(kit, latent_image=empty(batch=2))


def test_another_picture_to_begin_with_has_its_own_source(kit):
    begin = {"samples": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))}
    kit.draw(kit.drag(), denoise=0.8)
    assert not is_kept(kit, latent_image=begin, denoise=0.8)


def test_an_inpaint_mask_has_its_own_source(kit):
    mask = torch.ones(1, 1, 8, 8)
    mask[..., :3] = 0
    latents = [{**empty(), "noise_mask": each} for each in (mask, 1 - mask)]
    kit.draw(kit.drag())
    assert not is_kept(kit, latent_image=latents[0])
    assert is_kept(kit, latent_image=latents[0])
    assert not is_kept(kit, latent_image=latents[1])


def test_another_head_has_its_own_source(kit):
    kit.draw(kit.drag())
    other = kit.small.head("correspondence")
    with torch.inference_mode(False):
        for parameter in other.network.parameters():
            parameter *= 1.1
    assert not is_kept(kit, target={"head": other})


def test_another_checkpoint_has_its_own_source(kit):
    other = parity_model()
    engine("lab.cost.models").randomise(other.model.diffusion_model, seed=1)
    kit.draw(kit.drag())
    assert not is_kept(kit, model=other)


def test_a_lora_has_its_own_source(kit):
    name = "diffusion_model.output_blocks.6.0.in_layers.2.weight"
    change = torch.randn(kit.model.model.diffusion_model.output_blocks[6][0].in_layers[2].weight.shape) * 0.05
    lora = kit.model.clone()
    assert lora.add_patches({name: (change,)}, 1.0) == [name]
    weaker = kit.model.clone()
    weaker.add_patches({name: (change,)}, 0.5)
    kit.draw(kit.drag())
    assert not is_kept(kit, model=lora)
    assert not is_kept(kit, model=weaker)
    assert is_kept(kit, model=lora.clone())
    assert is_kept(kit)


def test_a_lora_that_works_through_hooks_has_its_own_source(kit):
    """ComfyUI's bypass LoRAs leave the weights as they are and inject hooks."""
    from comfy.model_patcher import PatcherInjection

    block = kit.model.model.diffusion_model.output_blocks[3][0]

    def scaled(factor):
        handles = []
        model = kit.model.clone()
        injection = PatcherInjection(
            inject=lambda _: handles.append(block.register_forward_hook(lambda m, a, out: out * factor)),
            eject=lambda _: handles.pop().remove(),
        )
        model.set_injections("bypass_lora", [injection])
        return model

    half, more = scaled(0.5), scaled(1.5)
    kit.draw(kit.drag())
    assert not is_kept(kit, model=half)
    assert not is_kept(kit, model=more)
    assert is_kept(kit, model=half.clone())


def freeu(model):
    from comfy_extras.nodes_freelunch import FreeU

    patched = FreeU().patch(model, 1.3, 1.4, 0.9, 0.2)
    return patched[0] if isinstance(patched, tuple) else patched.result[0]


def rescaled_cfg(model):
    patched = model.clone()
    patched.set_model_sampler_post_cfg_function(lambda args: args["denoised"] * 0.9)
    return patched


def other_sampling(model):
    import copy

    patched, sampling = model.clone(), copy.deepcopy(model.get_model_object("model_sampling"))
    sampling.set_sigmas(sampling.sigmas * 0.9)
    patched.add_object_patch("model_sampling", sampling)
    return patched


@pytest.mark.parametrize("patch", [freeu, rescaled_cfg, other_sampling])
def test_a_patched_model_has_its_own_source(kit, patch):
    patched = patch(kit.model)
    kit.draw(kit.drag())
    assert not is_kept(kit, model=patched)
    assert is_kept(kit, model=patched)


def test_another_hint_of_a_controlnet_has_its_own_source(kit):
    import comfy.cldm.cldm
    import comfy.controlnet
    import comfy.ops

    unet_config = kit.model.model.model_config.unet_config
    others = ("out_channels", "transformer_depth_output", "disable_unet_model_creation")
    config = {key: value for key, value in unet_config.items() if key not in others}
    net = comfy.cldm.cldm.ControlNet(hint_channels=3, operations=comfy.ops.disable_weight_init, device="cpu", **config)
    engine("lab.cost.models").randomise(net, seed=1)
    base = comfy.controlnet.ControlNet(net, load_device=kit.model.load_device, manual_cast_dtype=None)

    def prompt(seed, strength=0.5):
        """As Apply ControlNet makes it."""
        hint = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(seed))
        control = base.copy().set_cond_hint(hint, strength, (0.0, 1.0))
        return [[kit.small.positive[0][0], {"control": control, "control_apply_to_uncond": True}]]

    one, other, weaker = prompt(0), prompt(1), prompt(0, 0.2)
    kit.draw(kit.drag())
    for positive in (one, other, weaker):
        assert not is_kept(kit, positive=positive)
    assert is_kept(kit, positive=one)


def custom(kit, function, arrow=HERE):
    """Sampled by a sampler of one's own; whether it took one pass."""
    import comfy.samplers

    settings, small, latent = engine("guidance").GuidanceSettings(), kit.small, empty()["samples"]
    target = kit.drag(arrow)
    guider = engine("comfy_host.guided.sampling").readout_guider(
        kit.model, small.positive, small.negative, 4.0, target, settings
    )
    sigmas = comfy.samplers.calculate_sigmas(kit.model.get_model_object("model_sampling"), "normal", 3)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(0))
    totals = []
    sampler = comfy.samplers.KSAMPLER(function)
    out = guider.sample(noise, latent, sampler, sigmas, callback=lambda *a: totals.append(a[3]), seed=0)
    assert torch.isfinite(out).all()
    return totals[-1] == 3


def test_samplers_of_other_nodes_have_their_own_source(kit):
    from comfy.k_diffusion.sampling import sample_euler_ancestral

    def made(eta):
        return lambda model, x, sigmas, **more: sample_euler_ancestral(model, x, sigmas, eta=eta, **more)

    class Callable:
        def __call__(self, model, x, sigmas, **more):
            return sample_euler_ancestral(model, x, sigmas, eta=0.8, **more)

    calls = Callable()
    half, whole = (functools.partial(sample_euler_ancestral, eta=eta) for eta in (0.5, 1.0))
    for function, again, other in (
        (half, functools.partial(sample_euler_ancestral, eta=0.5), whole),
        (made(0.5), made(0.5), made(1.0)),
        (calls, calls, Callable()),
    ):
        assert not custom(kit, function)
        assert custom(kit, again, THERE)
        assert not custom(kit, other)


class Broken(Exception):
    pass


@pytest.mark.parametrize("how", ["interrupt", "error"])
def test_a_source_pass_that_was_cut_short_is_not_kept(kit, how):
    import comfy.model_management

    def stop(*_):
        if kit.calls() == 2:
            if how == "error":
                raise Broken
            comfy.model_management.interrupt_current_processing(True)
            comfy.model_management.throw_exception_if_processing_interrupted()

    handle = kit.model.model.diffusion_model.register_forward_hook(stop)
    expected = Broken if how == "error" else comfy.model_management.InterruptProcessingException
    with pytest.raises(expected):
        kit.draw(kit.drag())
    assert kit.calls() == 2
    handle.remove()
    assert not is_kept(kit)


# The passes that are kept


@pytest.fixture
def passes(comfyui):
    return engine("comfy_host.guided.source_pass")


def test_the_passes_used_last_are_kept(passes):
    kept = passes.SourcePasses()
    marks = [passes.Fingerprint(number) for number in range(passes.MOST_PASSES + 2)]
    for mark in marks[: passes.MOST_PASSES]:
        kept.keep(mark, passes.SourcePass())
    assert kept.find(marks[0]) is not None  # which makes it the one used last
    for mark in marks[passes.MOST_PASSES :]:
        kept.keep(mark, passes.SourcePass())
    found = [kept.find(mark) is not None for mark in marks]
    assert found == [True, False, False] + [True] * (passes.MOST_PASSES - 1)


class Thing:
    pass


def test_a_pass_goes_with_the_objects_that_it_was_made_with(passes):
    kept, source, thing = passes.SourcePasses(), passes.SourcePass(), Thing()
    mark = passes.Fingerprint({"model": thing})
    kept.keep(mark, source)
    assert kept.find(passes.Fingerprint({"model": thing})) is source
    later = passes.Fingerprint({"model": Thing()})
    later.digest = mark.digest  # as if it lay where the other one was
    assert kept.find(later) is None


def test_a_kept_pass_does_not_keep_the_model_alive(passes):
    import gc
    import weakref

    kept, thing = passes.SourcePasses(), Thing()
    kept.keep(passes.Fingerprint(thing), passes.SourcePass())
    alive = weakref.ref(thing)
    del thing
    gc.collect()
    assert alive() is None


# Fingerprints

TENSORS = {
    "fp32": torch.arange(6.0),
    "bf16": torch.arange(6.0).bfloat16(),
    "fp8": torch.arange(6.0).to(torch.float8_e4m3fn),
    "int64": torch.arange(6),
    "bool": torch.tensor([True, False]),
    "complex": torch.arange(6.0) * 1j,
    "0-dim": torch.tensor(3.0),
    "0-dim bool": torch.tensor(False),
    "a view": torch.arange(24.0).view(4, 6).t()[::2],
    "with a gradient": torch.arange(6.0).requires_grad_(),
}


@pytest.mark.parametrize("tensor", TENSORS.values(), ids=TENSORS)
def test_tensors_count_by_content(passes, tensor):
    digest = passes.Fingerprint(tensor).digest
    same = tensor.detach().clone(memory_format=torch.contiguous_format)  # an inference tensor
    other = same.clone()
    other.view(-1)[0] = not other.view(-1)[0] if other.dtype == torch.bool else 7
    assert passes.Fingerprint(same).digest == digest
    assert passes.Fingerprint(other).digest != digest
    assert passes.Fingerprint(same[None]).digest != digest


def test_empty_tensors_count_by_shape(passes):
    digests = {passes.Fingerprint(torch.zeros(shape)).digest for shape in ((0,), (0, 3), (3, 0))}
    assert len(digests) == 3
    assert passes.Fingerprint(torch.zeros(0, 3)).digest in digests


def test_values_of_other_types_or_nesting_differ(passes):
    values = [1, 1.0, True, "1", b"1", None, [1], [[1]], [1, [2]], [[1], 2], [[1, 2]], {1: 2}, {2: 1}, {"1": 2}, (), {}, 0.1]
    assert len({passes.Fingerprint(value).digest for value in values}) == len(values)
    for value in values:
        assert passes.Fingerprint(value).digest == passes.Fingerprint(value).digest


def test_what_changes_from_run_to_run_does_not_count(passes):
    def mark(uuid, more=1):
        return passes.Fingerprint([{"uuid": uuid, "more": more}]).digest

    assert mark("a") == mark("b")
    assert mark("a") != mark("a", 2)


def test_conditioning_counts_by_content_and_other_objects_by_identity(passes):
    import comfy.conds

    words = torch.randn(1, 2, 3)
    digests = [passes.Fingerprint(comfy.conds.CONDCrossAttn(each)).digest for each in (words, words.clone(), words + 1)]
    assert digests[0] == digests[1] != digests[2]
    one, other = Thing(), Thing()
    assert passes.Fingerprint(one).digest == passes.Fingerprint(one).digest != passes.Fingerprint(other).digest
