"""Whatever happens while noise is optimized, the model, the VAE and ComfyUI are as before, and what was found is kept."""

from __future__ import annotations

import hashlib

import pytest
import torch
from comfyui_host import engine, node


@pytest.fixture
def demo(comfyui):
    """The demo model: optimize(**inputs), and what it was given."""
    import nodes

    model, clip, vae = node("RG_LoadDemoModel")
    given = {
        "model": model, "seed": 2, "steps": 2, "cfg": 2.0, "sampler_name": "euler", "scheduler": "normal",
        "positive": nodes.CLIPTextEncode().encode(clip, "a red figure, grey wall")[0],
        "negative": nodes.CLIPTextEncode().encode(clip, "")[0],
        "latent_image": {"samples": torch.zeros(1, 4, 16, 16)}, "denoise": 1.0,
    }  # fmt: skip
    loss = node("RG_PictureLoss", kind="symmetry", weight=1.0)

    class Demo:
        inputs = given

        def optimize(self, **changed):
            return node("RG_OptimizeNoise", **{**given, "vae": vae, "loss": loss, "updates": 3, **changed})

        def plain(self):
            return nodes.KSampler().sample(**given)[0]["samples"]

        def fingerprint(self):
            found = []
            for network in (model.model.diffusion_model, vae.first_stage_model):
                for name, parameter in network.named_parameters():
                    digest = hashlib.sha256(parameter.detach().clone().numpy().tobytes()).hexdigest()
                    found.append((name, id(parameter), parameter.is_inference(), parameter.requires_grad, digest))
                for name, module in network.named_modules():
                    found.append((name, len(module._forward_hooks), "forward" in module.__dict__))
            return found, dict(model.wrappers), torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    demo = Demo()
    demo.model, demo.vae, demo.clip, demo.loss = model, vae, clip, loss
    return demo


class Broken(Exception):
    pass


class Failing:
    """A loss that does ``what`` at its call of number ``at``, beside the symmetry's."""

    def __init__(self, what, at):
        self.what, self.at, self.calls = what, at, 0

    def __call__(self, images, generator):
        self.calls += 1
        if self.calls == self.at:
            self.what()
        return engine("optimization.losses").symmetry_loss(images)


def loss_of(measure):
    return engine("optimization").PictureLoss(name="test", measure=measure)


def interrupt():
    import comfy.model_management

    comfy.model_management.interrupt_current_processing(True)
    comfy.model_management.throw_exception_if_processing_interrupted()


def fail():
    raise Broken


@pytest.fixture
def kept_as_it_was(demo):
    plain, before = demo.plain(), demo.fingerprint()
    yield
    assert demo.fingerprint() == before
    assert torch.equal(demo.plain(), plain)


def test_after_success(demo, kept_as_it_was):
    demo.optimize()


def test_after_an_error_in_a_loss(demo, kept_as_it_was):
    with pytest.raises(Broken):
        demo.optimize(loss=loss_of(Failing(fail, 2)))


@pytest.mark.parametrize("network", ["model", "vae"])
def test_after_an_error_in_backward(demo, kept_as_it_was, network, monkeypatch):
    class FailingBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise Broken

    module = (
        demo.model.model.diffusion_model.input_blocks[1][0] if network == "model" else demo.vae.first_stage_model.decoder
    )
    original = module.forward
    with monkeypatch.context() as patch:
        patch.setattr(module, "forward", lambda x, *a, **k: FailingBackward.apply(original(x, *a, **k)))
        with pytest.raises(Broken):
            demo.optimize()


def test_an_interrupt_keeps_the_best_so_far(demo, kept_as_it_was, caplog):
    latent, _noise, history, losses, _plot = demo.optimize(loss=loss_of(Failing(interrupt, 3)), updates=10)
    assert len(losses) == len(history) == 2
    assert "interrupted after 2 of 11 pictures: the best one goes on" in caplog.text
    two = demo.optimize(updates=1)
    assert torch.equal(latent["samples"], two[0]["samples"])


def test_an_interrupt_before_there_is_a_picture_ends_the_run(demo, kept_as_it_was):
    with pytest.raises(BaseException) as caught:  # noqa: PT011 (newer interrupts are no Exception)
        demo.optimize(loss=loss_of(Failing(interrupt, 1)))
    assert caught.type.__name__ == "InterruptProcessingException"


def test_an_interrupt_inside_of_backward(demo, kept_as_it_was, monkeypatch):
    """It comes while a model call runs again."""
    import comfy.model_management

    block = demo.model.model.diffusion_model.input_blocks[1][0]
    original, calls = block.forward, []

    def forward(x, *args, **kwargs):
        if torch.is_grad_enabled():
            calls.append(1)
            if len(calls) == 3:
                comfy.model_management.interrupt_current_processing(True)
        return original(x, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(block, "forward", forward)
        _latent, _noise, _history, losses, _plot = demo.optimize(updates=10)
    assert 1 <= len(losses) < 11


def out_of_memory(block, monkeypatch, times):
    """The block fails so often where there is a graph."""
    import comfy.model_management

    original, failed = block.forward, []

    def forward(*args, **kwargs):
        if torch.is_grad_enabled() and len(failed) < times:
            failed.append(True)
            raise comfy.model_management.OOM_EXCEPTION("out of memory")
        return original(*args, **kwargs)

    monkeypatch.setattr(block, "forward", forward)


@pytest.mark.parametrize("network", ["model", "vae"])
def test_out_of_memory_once_goes_on_with_the_light_graph(demo, kept_as_it_was, network, monkeypatch, caplog):
    wanted = demo.optimize()[3]
    block = (
        demo.model.model.diffusion_model.output_blocks[3][0] if network == "model" else demo.vae.first_stage_model.decoder
    )
    with monkeypatch.context() as patch:
        out_of_memory(block, patch, 1)
        losses = demo.optimize()[3]
    assert losses == pytest.approx(wanted, rel=1e-2)
    assert "the light graph is used from now on" in caplog.text


def test_out_of_memory_again_is_comfyuis_error(demo, kept_as_it_was, monkeypatch):
    import comfy.model_management

    with monkeypatch.context() as patch:
        out_of_memory(demo.model.model.diffusion_model.output_blocks[3][0], patch, 2)
        with pytest.raises(comfy.model_management.OOM_EXCEPTION):
            demo.optimize()


def test_a_loss_that_is_not_finite_stops_after_three(demo, kept_as_it_was, caplog):
    def measure(images, _generator):
        return images.flatten(1).mean(1) * float("nan")

    latent, _noise, _history, losses, _plot = demo.optimize(loss=loss_of(measure), updates=9)
    assert len(losses) == 3
    assert "the gradient was not finite 3 times in a row" in caplog.text
    assert torch.equal(latent["samples"], demo.plain())


def test_inputs_are_not_changed(demo):
    latent = {"samples": torch.randn(1, 8, 16, 16)}
    kept = [t.clone() for t in (latent["samples"], demo.inputs["positive"][0][0])]
    demo.optimize(latent_image=latent, denoise=0.7)
    for now, then in zip((latent["samples"], demo.inputs["positive"][0][0]), kept, strict=True):
        assert torch.equal(now, then)


def test_optimized_for_a_readout_and_then_guided_in_one_graph(demo, kept_as_it_was):
    """A pose that the finished picture is read for, beside a loss of its pixels; then guidance from the noise found."""
    head = node("RG_LoadReadoutHead", head_name="demo_pose.safetensors", kind="auto")
    scene = node("RG_DemoScene", seed=11, count=1, figure_only=True)
    target = node(
        "RG_ReadoutTarget", head=head, weight=1.0, start_percent=0.0, end_percent=0.5, image=scene[1]
    )  # fmt: skip
    only = demo.optimize(loss=None, target=target, updates=6, steps=4)
    assert min(only[3]) < 0.9 * only[3][0]
    both = demo.optimize(target=target, updates=2)
    assert both[3][0] == pytest.approx(
        demo.optimize(loss=None, target=target, updates=0)[3][0] + demo.optimize(updates=0)[3][0], rel=1e-4
    )
    inputs = {**demo.inputs, "steps": 4, "latent_image": only[1]}
    guided = node(
        "RG_ReadoutGuidedKSampler", **inputs, target=target, strength=1.0, mode="fast", iterations=1, source_cfg=-1.0
    )  # fmt: skip
    assert not torch.equal(guided["samples"], only[0]["samples"])
    unguided = node(
        "RG_ReadoutGuidedKSampler", **inputs, target=target, strength=0.0, mode="fast", iterations=1, source_cfg=-1.0
    )  # fmt: skip
    torch.testing.assert_close(unguided["samples"], only[0]["samples"], rtol=1e-3, atol=1e-3)


def test_a_readouts_gradient_in_half_precision(demo):
    """Each feature's share of the loss would be 0 in fp16 as it is."""
    from optimized_runs import along, gradient_of

    head = node("RG_LoadReadoutHead", head_name="demo_pose.safetensors", kind="auto")
    scene = node("RG_DemoScene", seed=11, count=1, figure_only=True)
    target = node("RG_ReadoutTarget", head=head, weight=1.0, start_percent=0.0, end_percent=0.5, image=scene[1])
    finished = engine("comfy_host.optimized.measured.finished_readout").FinishedReadout
    backbone = engine("comfy_host.loaded.model").backbone_of(demo.model)

    def work(way, network):
        read = finished(network, demo.model.model_options, (target,), backbone, torch.zeros_like(way.start[0]) + 0.1)
        return gradient_of(way, lambda ends: 1e-4 * read(ends[0]).sum())[1].flatten().double()

    prompts = demo.inputs["positive"], demo.inputs["negative"]
    found = []
    for dtype in (torch.float32, torch.float16):
        network = demo.model.model.diffusion_model
        network.to(dtype)
        network.dtype = dtype
        found.append(along(demo.model, *prompts, work, steps=2, shape=(1, 8, 16, 16)))
    assert float(torch.cosine_similarity(*found, dim=0)) > 0.99


@pytest.mark.parametrize("kind", ["demo_depth", "demo_keypoints", "demo_sketch", "demo_appearance", "demo_correspondence"])
def test_heads_of_every_kind(demo, kind):
    import nodes

    head = node("RG_LoadReadoutHead", head_name=f"{kind}.safetensors", kind="auto")
    scene = node("RG_DemoScene", seed=11, count=1, figure_only=True)
    reference = nodes.VAEEncode().encode(demo.vae, scene[3 if kind == "demo_sketch" else 0])[0]
    given = {
        "demo_depth": {"image": scene[2]}, "demo_keypoints": {"readout": scene[5]},
        "demo_sketch": {"reference_latent": reference}, "demo_appearance": {"reference_latent": reference},
    }.get(kind)  # fmt: skip
    if given is None:
        points = '{"version": 1, "drags": [{"from": [0.5, 0.5], "to": [0.6, 0.5]}]}'
        given = {"drag_points": node("RG_DragPoints", points=points)[0]}
    target = node("RG_ReadoutTarget", head=head, weight=1.0, start_percent=0.0, end_percent=0.5, **given)
    losses = demo.optimize(loss=None, target=target, updates=4, strength=0.2)[3]
    assert min(losses) < losses[0] - 0.01 * abs(losses[0])
