"""Whatever happens during a guided run, the loaded model and ComfyUI are as before."""

from __future__ import annotations

import pytest
import torch
from comfyui_host import engine, node
from unchanged import fingerprint, modes


class Broken(Exception):
    pass


class FailingBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise Broken


def break_tap(small, monkeypatch):
    def fail(self):
        raise Broken

    monkeypatch.setattr(engine("features.tap").FeatureTap, "take", fail)


def break_head(small, monkeypatch):
    def fail(*_, **__):
        raise Broken

    monkeypatch.setattr(engine("heads.aggregation").AggregationNetwork, "forward", fail)


def break_loss(small, monkeypatch):
    def fail(*_, **__):
        raise Broken

    monkeypatch.setattr(engine("guidance.objective"), "spatial_loss", fail)


def break_backward(small, monkeypatch):
    """Fails in the network's own backward, after that of the head."""
    block = small.model.model.diffusion_model.input_blocks[1][0]
    original = block.forward
    monkeypatch.setattr(block, "forward", lambda x, *a: FailingBackward.apply(original(x, *a)))


def break_update(small, monkeypatch):
    def fail(*_, **__):
        raise Broken

    monkeypatch.setattr(engine("comfy_host.guided.step"), "rms_step", fail)


def interrupt(small, monkeypatch):
    import comfy.model_management

    take = engine("features.tap").FeatureTap.take

    def interrupted(self):
        comfy.model_management.interrupt_current_processing(True)
        comfy.model_management.throw_exception_if_processing_interrupted()
        return take(self)

    monkeypatch.setattr(engine("features.tap").FeatureTap, "take", interrupted)


def run_out_of_memory(small, monkeypatch):
    import comfy.model_management

    block = small.model.model.diffusion_model.output_blocks[4][0]

    def fail(*_):
        raise comfy.model_management.OOM_EXCEPTION("out of memory")

    monkeypatch.setattr(block, "forward", fail)


def run_out_of_memory_once(small, monkeypatch):
    """In the first guided pass; the run goes on with the light graph."""
    import comfy.model_management

    block, failed = small.model.model.diffusion_model.output_blocks[4][0], []
    original = block.forward

    def fail(*args):
        if torch.is_grad_enabled() and not failed:
            failed.append(True)
            raise comfy.model_management.OOM_EXCEPTION("out of memory")
        return original(*args)

    monkeypatch.setattr(block, "forward", fail)


def break_light_backward(small, monkeypatch):
    run_out_of_memory_once(small, monkeypatch)
    break_backward(small, monkeypatch)


STAGES = [
    break_tap, break_head, break_loss, break_backward, break_update, interrupt, run_out_of_memory, break_light_backward,
]  # fmt: skip
RAISED = {interrupt: "InterruptProcessingException", run_out_of_memory: "OutOfMemoryError"}


@pytest.mark.parametrize("stage", STAGES, ids=lambda f: f.__name__)
def test_after_an_error(small, stage):
    plain = small.plain()
    before, before_modes = fingerprint(small.model), modes()
    target = small.target()
    with pytest.MonkeyPatch.context() as monkeypatch:
        stage(small, monkeypatch)
        with pytest.raises(BaseException) as caught:  # noqa: PT011 (the type is checked below; newer interrupts are no Exception)
            small.sample(target)
    assert caught.type.__name__ == RAISED.get(stage, "Broken")
    assert fingerprint(small.model) == before
    assert modes() == before_modes
    assert not any(p.requires_grad for p in target.head.network.parameters())
    assert torch.equal(small.plain(), plain)
    assert torch.isfinite(small.sample(target)).all()


@pytest.mark.parametrize("mode", ["fast", "reference"])
def test_after_success(small, mode):
    plain = small.plain()
    before, before_modes = fingerprint(small.model), modes()
    small.sample(small.target(previous=small.target("appearance")), mode=mode)
    assert fingerprint(small.model) == before
    assert modes() == before_modes
    assert torch.equal(small.plain(), plain)


def test_after_going_on_with_the_light_graph(small):
    plain = small.plain()
    before, before_modes = fingerprint(small.model), modes()
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_out_of_memory_once(small, monkeypatch)
        guided = small.sample(small.target())
    assert not torch.equal(guided, plain)
    assert fingerprint(small.model) == before
    assert modes() == before_modes
    assert torch.equal(small.plain(), plain)


def test_the_model_that_was_given_is_not_changed(small):
    wrappers, options = dict(small.model.wrappers), dict(small.model.model_options)
    small.sample(small.target())
    assert small.model.wrappers == wrappers
    assert small.model.model_options == options


def test_inputs_are_not_changed(small):
    latent = {"samples": torch.randn(1, 4, 16, 16)}
    kept = [t.clone() for t in (latent["samples"], small.positive[0][0], small.control)]
    small.sample(small.target(), latent_image=latent, denoise=0.7)
    for now, then in zip((latent["samples"], small.positive[0][0], small.control), kept, strict=True):
        assert torch.equal(now, then)


def on_tiles(model):
    """Another node that calls the model on its left and its right half."""
    model = model.clone()

    def wrapper(apply_model, args):
        halves = args["input"].chunk(2, -1)
        return torch.cat([apply_model(half, args["timestep"], **args["c"]) for half in halves], -1)

    model.set_model_unet_function_wrapper(wrapper)
    return model


def guided_model(small, way):
    settings = {"strength": 2.0, "mode": "fast", "iterations": 2, "source_cfg": -1.0}
    model = on_tiles(small.model) if way == "on tiles" else small.model
    if way == "keyframes":
        settings["keyframes"], _ = node("RG_ReadoutKeyframes", keyframes=["0: 1; 0.5: 0.5"], interpolation=["linear"])
    model = node("RG_ApplyReadoutGuidance", model=model, target=small.target(), **settings)
    if way == "twice":
        model = node("RG_ApplyReadoutGuidance", model=model, target=small.target(), **{**settings, "mode": "reference"})
    return model


@pytest.mark.parametrize(
    "stage",
    [None, break_head, break_backward, interrupt, run_out_of_memory],
    ids=lambda f: getattr(f, "__name__", "success"),
)
@pytest.mark.parametrize("way", ["applied", "twice", "on tiles", "keyframes"])
def test_a_guided_model(small, way, stage):
    """However it is guided, and whatever happens: the next run is as the first, guided or not."""
    plain, guided = small.plain(), guided_model(small, way)
    wanted = small.plain(model=guided)
    before, before_modes = fingerprint(small.model), modes()
    if stage is not None:
        with pytest.MonkeyPatch.context() as monkeypatch:
            stage(small, monkeypatch)
            with pytest.raises(BaseException) as caught:  # noqa: PT011
                small.plain(model=guided)
        assert caught.type.__name__ == RAISED.get(stage, "Broken")
    assert fingerprint(small.model) == before
    assert modes() == before_modes
    assert torch.equal(small.plain(), plain)
    assert torch.equal(small.plain(model=guided), wanted)
