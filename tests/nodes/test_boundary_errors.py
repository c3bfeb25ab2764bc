"""Bad input is refused before the model runs; whatever happens on the way, everything is as before."""

from __future__ import annotations

import dataclasses
import hashlib
from types import SimpleNamespace

import pytest
import torch
from comfyui_host import engine, node
from small_models import sdxl_model


class Broken(Exception):
    pass


FIT = {"space": "z", "mixing_step": 300, "steps": 3, "solver": "svm", "held_out": 0.0}
EDIT = {"strength": 1.0, "move": "by", "cfg": 1.0, "eta": 0.0, "seed": 0}


def fingerprint(model) -> list:
    """Each parameter as an object, its bytes, and every hook and replaced forward of the network."""
    network = model.model.diffusion_model
    weights = [
        (name, id(p), hashlib.sha256(p.detach().numpy().tobytes()).hexdigest()) for name, p in network.named_parameters()
    ]
    hooks = [
        (name, len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in m.__dict__)
        for name, m in network.named_modules()
    ]
    return weights + hooks


def modes() -> tuple[bool, bool]:
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled()


@pytest.fixture
def kit(small):
    """The parity kit's model, random pictures; fit(...), edit(...), boundary, and the model's calls."""
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randn(8, 4, 8, 8, generator=generator)
    pictures[:4, 0] += 1
    kit = SimpleNamespace(
        model=small.model, positive=small.positive, negative=small.negative, plain=small.plain, calls=[],
        having={"samples": pictures[:4]}, lacking={"samples": pictures[4:]}, picture={"samples": pictures[:1].clone()},
    )  # fmt: skip
    small.model.model.diffusion_model.register_forward_pre_hook(lambda *_: kit.calls.append(1))

    def fit(**inputs):
        given = {"model": kit.model, "having": kit.having, "lacking": kit.lacking, "positive": kit.positive, **FIT, **inputs}
        return node("RG_FitBoundary", **given)

    def edit(latent=None, **inputs):
        given = {"model": kit.model, "boundary": kit.boundary, "positive": kit.positive, **EDIT, **inputs}
        return node("RG_BoundaryEdit", latent=latent or kit.picture, **given)[0]["samples"]

    kit.fit, kit.edit, kit.boundary = fit, edit, fit()[0]
    kit.calls.clear()
    return kit


@pytest.fixture
def refused(kit):
    """refused(words, what is tried): a BoundaryError with these words, and no call of the model."""

    def check(words, attempt):
        with pytest.raises(engine("errors").BoundaryError, match=words):
            attempt()
        assert not kit.calls

    return check


def test_pictures_that_teach_nothing(kit, refused):
    one, nan = {"samples": kit.having["samples"][:1]}, {"samples": kit.having["samples"] * float("nan")}
    refused("only pictures with the attribute", lambda: kit.fit(lacking=None))
    refused("labels and a second batch", lambda: kit.fit(labels="1 0"))
    refused("4 of 4 pictures have", lambda: kit.fit(lacking=None, labels="1 1 1 1"))
    refused("there are 2 labels for 4", lambda: kit.fit(lacking=None, labels="1 0"))
    refused("all pictures are alike", lambda: kit.fit(having=one, lacking=one))
    refused("not numbers", lambda: kit.fit(having=nan))
    refused("4 x 8 x 8 and 4 x 8 x 16", lambda: kit.fit(lacking={"samples": torch.randn(2, 4, 8, 16)}))
    refused("encode pictures with the model's own VAE", lambda: kit.fit(having={"samples": torch.randn(2, 16, 8, 8)}))
    refused("need a VAE", lambda: kit.fit(having=torch.rand(2, 64, 64, 3)))


def test_settings_of_a_fit(kit, refused):
    refused("needs a mask of it in every picture", lambda: kit.fit(space="region"))
    refused("only one of the batches has masks", lambda: kit.fit(space="region", mask=torch.ones(4, 8, 8)))
    refused("there are 3 masks for 4", lambda: kit.fit(mask=torch.ones(3, 8, 8)))
    refused("a mask is empty", lambda: kit.fit(mask=torch.zeros(1, 8, 8)))
    refused("lies outside the schedule", lambda: kit.fit(mixing_step=999))
    refused("lies outside the schedule", lambda: kit.fit(mixing_step=-3))
    refused("steps are 1 .* give 2 or more", lambda: kit.fit(steps=1))
    refused("solver 'forest'", lambda: kit.fit(solver="forest"))
    three = [[torch.zeros(3, 8, 32), {}]]
    refused("the prompt has 3 rows for 8 pictures", lambda: kit.fit(positive=three))


def test_one_picture_of_each_kind_is_enough_to_go_on(kit):
    one, other = ({"samples": each["samples"][:1]} for each in (kit.having, kit.lacking))
    boundary, report, plot, _ = kit.fit(having=one, lacking=other, held_out=0.2)
    assert "No pictures were kept back" in report
    assert torch.isfinite(plot).all()
    assert torch.isfinite(kit.edit(boundary=boundary)).all()


def test_a_boundary_of_another_model_or_size(kit, refused):
    other = sdxl_model()
    refused("was fitted on .*9 maps.*this model is", lambda: kit.edit(model=other))
    refused(
        "fitted on latents of 4 x 8 x 8, this one is 4 x 16 x 8", lambda: kit.edit({"samples": torch.randn(1, 4, 16, 8)})
    )
    more = dataclasses.replace(kit.boundary, latent_shape=(16, 8, 8))
    refused("16 latent channels; this model is", lambda: kit.edit(boundary=more))


def test_settings_of_an_edit(kit, refused):
    nan = {"samples": kit.picture["samples"] * float("nan")}
    refused("not numbers", lambda: kit.edit(nan))
    refused("noise mask", lambda: kit.edit({**kit.picture, "noise_mask": torch.ones(1, 1, 8, 8)}))
    refused("cfg is 3, which needs a negative prompt", lambda: kit.edit(cfg=3.0))
    refused("strengths are 'a lot'", lambda: kit.edit(strengths="a lot"))
    refused("must be numbers", lambda: kit.edit(strengths="nan"))
    refused("the strength is nan", lambda: kit.edit(strength=float("nan")))
    refused("eta 2 must lie between", lambda: kit.edit(eta=2.0))
    refused("there is no move 'away'", lambda: kit.edit(move="away"))
    refused("there are 2 masks for 1", lambda: kit.edit(mask=torch.ones(2, 8, 8)))
    refused("a mask is empty", lambda: kit.edit(mask=torch.zeros(1, 8, 8)))
    refused("give a mask of", lambda: kit.edit(mask=torch.ones(8, 8)))
    refused("give a mask of", lambda: kit.edit(mask=torch.full((1, 8, 8), float("nan"))))
    refused("not videos", lambda: kit.edit({"samples": torch.randn(1, 4, 3, 8, 8)}))
    refused("the prompt has 3 rows for 1", lambda: kit.edit(positive=[[torch.zeros(3, 8, 32), {}]]))
    region = dataclasses.replace(kit.boundary.parts[0], space="region", normal=torch.ones(4) / 2)
    refused("connect a mask of it", lambda: kit.edit(boundary=dataclasses.replace(kit.boundary, parts=(region,))))
    inverted, _ = engine("comfy_host.edits.inversion").invert_latent(kit.model, kit.picture, steps=2, scheduler="normal")
    kit.calls.clear()
    refused("inverted already", lambda: kit.edit(inverted))


def test_a_chain_of_nearly_one_boundary(kit, refused):
    part = kit.boundary.parts[0]
    near = part.normal + 0.005 * torch.randn(part.normal.shape, generator=torch.Generator().manual_seed(0))
    near = dataclasses.replace(kit.boundary, parts=(dataclasses.replace(part, normal=near / near.norm()),))
    edits = node("RG_BoundaryEdit", model=kit.model, boundary=kit.boundary, latent=kit.picture, **EDIT)[2]
    kit.calls.clear()
    refused("is nearly one of those before it", lambda: kit.edit(boundary=near, previous=edits))


def test_h_of_a_network_that_is_not_known(kit, refused, monkeypatch):
    def unknown(_):
        raise engine("errors").BackboneError("the model is a Stranger, which can't be read out yet")

    monkeypatch.setattr(engine("comfy_host.edits.crossing"), "backbone_of", unknown)
    refused("there is no h to read: .*Stranger", lambda: kit.fit(space="h"))


# Restored


def break_hidden(kit, monkeypatch):
    def fail(*_):
        raise Broken

    monkeypatch.setattr(engine("comfy_host.edits.hidden").Hidden, "_hook", fail)


def break_network(kit, monkeypatch):
    block, calls = kit.model.model.diffusion_model.output_blocks[2][0], []
    forward = block.forward

    def fail(*args):
        calls.append(1)
        if len(calls) == 3:
            raise Broken
        return forward(*args)

    monkeypatch.setattr(block, "forward", fail)


def break_move(kit, monkeypatch):
    def fail(*_):
        raise Broken

    monkeypatch.setattr(engine("comfy_host.edits.crossing"), "shifted", fail)


def interrupt_on_call(number):
    def interrupt(kit, monkeypatch):
        import comfy.model_management

        block, calls = kit.model.model.diffusion_model.output_blocks[2][0], []
        forward = block.forward

        def ask(*args):
            calls.append(1)
            if len(calls) == number:
                comfy.model_management.interrupt_current_processing(True)
            return forward(*args)

        monkeypatch.setattr(block, "forward", ask)

    interrupt.__name__ = f"interrupt on call {number}"
    return interrupt


STAGES = [break_hidden, break_network, break_move, interrupt_on_call(1), interrupt_on_call(4)]


@pytest.mark.parametrize("stage", STAGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("what", ["fit", "edit"])
def test_after_an_error_or_an_interrupt(kit, what, stage, monkeypatch):
    monkeypatch.setattr(engine("comfy_host.edits.boundary_edit"), "INVERSIONS", engine("comfy_host.loaded.kept").Kept(4))
    plain = kit.plain()
    both = kit.fit(space="both")[0]
    run = (lambda: kit.fit(space="both", held_out=0.5)) if what == "fit" else (lambda: kit.edit(boundary=both))
    torch.manual_seed(7)
    before, before_modes, random = fingerprint(kit.model), modes(), torch.get_rng_state()
    kept = kit.picture["samples"].clone()
    with pytest.MonkeyPatch.context() as patch:
        stage(kit, patch)
        with pytest.raises(BaseException) as caught:  # noqa: PT011 (the type is checked below)
            run()
    assert caught.type.__name__ == ("InterruptProcessingException" if "interrupt" in stage.__name__ else "Broken")
    assert fingerprint(kit.model) == before
    assert modes() == before_modes
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(kit.picture["samples"], kept)
    assert torch.equal(kit.plain(), plain)
    assert run() is not None


def test_after_success(kit):
    both = kit.fit(space="both", held_out=0.5)[0]
    plain, wrappers, options = kit.plain(), dict(kit.model.wrappers), dict(kit.model.model_options)
    torch.manual_seed(7)
    before, before_modes, random = fingerprint(kit.model), modes(), torch.get_rng_state()
    empty = {"samples": torch.zeros(1, 4, 8, 8)}
    for latent in (kit.picture, empty):
        assert torch.isfinite(kit.edit(latent, boundary=both, eta=1.0, strengths="-1 0 1")).all()
    kit.fit(space="both", held_out=0.5)
    assert fingerprint(kit.model) == before
    assert modes() == before_modes
    assert torch.equal(torch.get_rng_state(), random)
    assert kit.model.wrappers == wrappers
    assert kit.model.model_options == options
    assert torch.equal(kit.plain(), plain)


def test_a_flow_model_is_inverted_and_comes_back(kit):
    """z is x there, and levels are parts of its own diffusion time."""
    import comfy.model_sampling

    class Flow(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
        pass

    model = kit.model.clone()
    model.add_object_patch("model_sampling", Flow(kit.model.model.model_config))
    model.set_model_unet_function_wrapper(
        lambda run, given: given["input"] - 0.1 * (given["input"] - run(given["input"], given["timestep"], **given["c"]))
    )
    kit.model = model
    boundary = kit.fit(steps=12)[0]
    gone = kit.edit(boundary=boundary, strength=0.0)
    assert float((gone - kit.picture["samples"]).norm() / kit.picture["samples"].norm()) < 0.2
    moved = kit.edit(boundary=boundary, strengths="-1 1", eta=0.5)
    assert torch.isfinite(moved).all()
    along = (moved * boundary.parts[0].normal).flatten(1).sum(1)
    assert float(along[1]) > float(along[0])
