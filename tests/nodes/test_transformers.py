"""Readout guidance on transformers: every family that this ComfyUI has, small and with random weights."""

from __future__ import annotations

import contextlib
import functools
from types import SimpleNamespace

import pytest
import torch
from comfyui_host import engine, find_comfyui, node
from small_transformers import FAMILIES, is_there, prompt, transformer, zero_latent

pytestmark = pytest.mark.usefixtures("comfyui")

#: Those that stand for the others where a test takes long: text and picture apart and together, padded, with a frame.
SOME = ("sd3", "flux", "z-image", "qwen-image", "wan2.1")
ALL = pytest.mark.parametrize("name", list(FAMILIES))
A_FEW = pytest.mark.parametrize("name", SOME)


@functools.cache
def made(name, **how):
    if not is_there(name):
        pytest.skip("not in this ComfyUI")
    return transformer(name, **how)


@pytest.fixture(autouse=True, scope="module")
def models_are_let_go():
    yield
    made.cache_clear()


def seen(name, model, look, latent=None, cfg=1.0, steps=2, batch=1):
    """``look(network, backbone, run, x)`` at the second model call of a sampling; run(x) runs the network as it ran."""
    from comfy.patcher_extension import WrappersMP

    import nodes

    backbone, found = engine("comfy_host.loaded.model").backbone_of(model), []
    network = model.model.diffusion_model

    def wrapper(executor, x, t, *args, **kwargs):
        wrapper.calls += 1
        if wrapper.calls == 2:
            plain = engine("comfy_host.loaded.frozen_layers").plain

            def run(x, **more):
                given = list(plain(args))
                given[-1] = {**given[-1], **more}
                return executor(x, plain(t), *given, **plain(kwargs))

            found.append(look(network, backbone, run, x))
        return executor(x, t, *args, **kwargs)

    wrapper.calls = 0
    watched = model.clone()
    watched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test", wrapper)
    latent = zero_latent(name, batch) if latent is None else latent
    nodes.KSampler().sample(watched, 3, steps, cfg, "euler", "simple", prompt(name, 1), prompt(name, 2), {"samples": latent})
    return found[0]


def head(model, seed=0, taps=None):
    """A random spatial head that reads this model, at its usual block or others."""
    backbone = engine("comfy_host.loaded.model").backbone_of(model)
    backbone = backbone if taps is None else backbone.at(taps)
    return engine("training.new_head").new_head(
        "spatial", backbone, name="random", output_channels=1, projection=64, seed=seed
    )


def target(model, **more):
    image = torch.rand(1, 4, 4, 1, generator=torch.Generator().manual_seed(9))
    image = torch.nn.functional.interpolate(image.movedim(-1, 1), (96, 128), mode="bilinear").movedim(1, -1)
    return node(
        "RG_ReadoutTarget", head=more.pop("head", None) or head(model), weight=1.0, start_percent=0.0,
        end_percent=more.pop("end_percent", 0.8), image=image, **more,
    )  # fmt: skip


def guided(name, model, target, cfg=4.0, batch=1, seed=3, **more):
    settings = {"steps": 8, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0, "strength": 1.0, "mode": "fast",
                "iterations": 1, "source_cfg": -1.0, **more}  # fmt: skip
    return node(
        "RG_ReadoutGuidedKSampler", model=model, seed=seed, cfg=cfg, positive=prompt(name, 1), negative=prompt(name, 2),
        latent_image={"samples": zero_latent(name, batch)}, target=target, **settings,
    )["samples"]  # fmt: skip


def losses(name, model, target, monkeypatch, still=False, **more):
    """First and last loss of a run, guided or with moves of no length, and the picture."""
    found = []
    guidance_module, step = engine("comfy_host.guided.model"), engine("comfy_host.guided.step")
    with monkeypatch.context() as patched:
        patched.setattr(guidance_module, "report_run", lambda run: found.append([float(x.mean()) for x in run.losses]))
        if still:
            patched.setattr(step, "_inside", lambda run, move: move * 0)
        picture = guided(name, model, target, **more)
    return found[0], picture


@ALL
@pytest.mark.parametrize("odd", [False, True], ids=["even", "odd"])
def test_the_map_is_in_the_right_place(name, odd):
    """A patch of the latent is changed, and every block's map changes most there."""
    model = made(name)
    features = engine("features")

    def look(network, backbone, run, x):
        every = backbone.at(backbone.blocks)
        layout = every.layouts[0]
        rows, columns = (-(-side // layout.patch) for side in x.shape[-2:])
        wrong = []
        for row, column in ((1, 2), (3, 0), (rows - 2, columns - 2)):
            changed = x.clone()
            cells = (slice(i * layout.patch, (i + 1) * layout.patch) for i in (row, column))
            changed[(..., *cells)] += 0.3
            maps = []
            for latent in (x, changed):
                with features.FeatureTap(network, every) as tap:
                    run(latent)
                    maps.append(tap.take()[0])
            for path, before, after in zip(every.taps, *maps, strict=True):
                difference = (after - before).norm(dim=1)[0]
                scale = layout.patch if difference.shape == x.shape[-2:] else 1
                place = tuple(int(v) // scale for v in divmod(int(difference.argmax()), difference.shape[1]))
                wrong += [] if place == (row, column) else [(path, place, (row, column))]
        return wrong

    latent = zero_latent(name)
    if odd and name in ("pixart", "cosmos"):
        pytest.skip("ComfyUI itself makes no pictures of odd sizes with it")
    if odd:
        latent = latent[..., : latent.shape[-2] - 1, : latent.shape[-1] - 3].clone()
    assert seen(name, model, look, latent) == []


@ALL
@pytest.mark.parametrize("graph", ["full", "light"])
def test_the_gradient_is_that_of_finite_differences(name, graph, monkeypatch):
    """In fp64, where a network computes in it; of the light graph, to the last bits of the full one's."""
    import comfy.model_management

    single = FAMILIES[name].blind and engine("comfy_host.loaded.kitchen")._EAGER  # its kernels take no fp64
    model = made(name) if single else made(name, stored=torch.float64)
    features = engine("features")
    if not single:
        monkeypatch.setattr(comfy.model_management, "in_training", True, raising=False)  # kernels in Python, which do

    def look(network, backbone, run, x):
        generator = torch.Generator().manual_seed(5)
        x = x if single else x.double()

        def read(x):
            with features.FeatureTap(network, backbone) as tap:
                run(x)
                return tap.take()[0][0].double()

        direction = torch.randn(read(x).shape, generator=generator, dtype=torch.float64)
        gradients = [gradient_of(network, backbone, run, x, direction, each) for each in {"full", graph}]
        worst = 0.0
        for k in range(4):
            way = gradients[0].clone() if k == 0 else torch.randn(x.shape, generator=generator, dtype=x.dtype)
            way /= way.norm()
            h = 0.08
            f = lambda s: float((read(x + s * way) * direction).sum())  # noqa: B023, E731
            slope = (8 * (f(h) - f(-h)) - (f(2 * h) - f(-2 * h))) / (12 * h)
            worst = max(worst, abs(slope - float((gradients[0] * way).sum())) / float(gradients[0].norm()))
        return worst, float((gradients[0] - gradients[-1]).norm() / gradients[0].norm())

    error, between = seen(name, model, look)
    assert error < (1e-3 if single else 1e-4)
    assert between < (1e-5 if single else 1e-9)


def gradient_of(network, backbone, run, x, direction, graph):
    """The gradient of <map, direction> with respect to the network's input, as guided steps take it."""
    loaded = SimpleNamespace(
        scope=engine("comfy_host.loaded.gradient_scope"), beside=engine("comfy_host.loaded.saved_tensors").beside_other_nodes
    )
    attention = engine("comfy_host.guided.attention").ATTENTION[graph]
    scope = loaded.scope.GradientScope(network, graph, backbone)
    with scope, loaded.beside(scope.writes), engine("features").FeatureTap(network, backbone) as tap:
        leaf = x.detach().clone().requires_grad_()
        run(leaf, optimized_attention_override=attention)
        (map_,), _ = tap.take()
        return torch.autograd.grad((map_ * direction.clone().to(map_)).sum(), leaf)[0].detach()


def after_a_move(found):
    """The mean loss of a run's steps but the first."""
    return sum(found[1:]) / len(found[1:])


@ALL
def test_guidance_lowers_the_loss_and_moves_of_no_length_change_nothing(name, monkeypatch):
    model, cfg = made(name), 1.0 if name in ("flux", "kontext", "schnell") else 4.0
    # What a random head reads turns round within a longer move; a prompt that is left out changes a little.
    short = {"cfg": cfg, "strength": 0.25, "keep_negative": 0}
    followed = target(model, head=head(model, seed=4 if name == "hunyuan-dit" else 0))  # 0 is all noise to it
    with_moves, picture = losses(name, model, followed, monkeypatch, **short)
    without, still = losses(name, model, followed, monkeypatch, **short, still=True)
    plain = guided(name, model, None, cfg=cfg)
    assert after_a_move(with_moves) < after_a_move(without)
    assert not torch.equal(picture, plain)
    difference = float((still - plain).abs().max() / plain.abs().max())
    # ComfyUI runs prompts of one length together, and the guided one runs by itself.
    assert difference <= (2e-6 if name.startswith(("flux2", "hunyuan-dit")) else 0.0)


@A_FEW
@pytest.mark.parametrize("mode", ["reference", "norm_ratio"])
@pytest.mark.parametrize("cfg", [1.0, 5.0])
def test_every_mode_and_cfg_lowers_the_loss_of_a_batch(name, mode, cfg, monkeypatch):
    model = made(name)
    more = {"mode": mode, "cfg": cfg, "batch": 2, "strength": 2.0 if mode == "reference" else 0.5}
    with_moves, _ = losses(name, model, target(model), monkeypatch, **more)
    without, _ = losses(name, model, target(model), monkeypatch, still=True, **more)
    assert after_a_move(with_moves) < after_a_move(without)


@A_FEW
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float8_e4m3fn], ids=["bf16", "fp8"])
@pytest.mark.parametrize("graph", ["full", "light"])
def test_weights_that_are_cast_give_the_gradient_of_the_same_weights(name, stored, graph):
    cast, plain = transformer_like(name, stored)

    def look(network, backbone, run, x):
        direction = torch.randn(x.shape[0], backbone.channels[0], 1, 1, generator=torch.Generator().manual_seed(1))
        return gradient_of(network, backbone, run, x, direction, graph)

    a, b = seen(name, cast, look), seen(name, plain, look)
    assert torch.equal(a, b) or float((a - b).norm() / b.norm()) < 1e-6


def transformer_like(name, stored):
    """A model with weights stored in another type, computing in fp32, and one of the same weights in fp32."""
    if not is_there(name):
        pytest.skip("not in this ComfyUI")
    cast, plain = transformer(name, stored=stored, computes=torch.float32), transformer(name)
    weights = {key: value.float() for key, value in cast.model.diffusion_model.state_dict().items()}
    plain.model.diffusion_model.load_state_dict(weights)
    return cast, plain


def state(network):
    import comfy.model_management

    return (
        getattr(comfy.model_management, "in_training", None), torch.is_grad_enabled(), torch.is_inference_mode_enabled(),
        len(torch.overrides._get_current_function_mode_stack()),
        sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules()),
        sum("forward" in m.__dict__ for m in network.modules()), all(p.is_inference() for p in network.parameters()),
    )  # fmt: skip


@A_FEW
@pytest.mark.parametrize("where", ["block", "head", "rerun", "nowhere"])
def test_everything_is_put_back_after_an_error(name, where, monkeypatch):
    model = made(name)
    network = model.model.diffusion_model
    before, plain, calls = state(network), guided(name, model, None), []
    layer = next(m for m in network.get_submodule(target_block(model)).modules() if isinstance(m, torch.nn.Linear))
    original = layer.forward

    def broken(*args, **kwargs):
        if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
            calls.append(1)
            if len(calls) > (where == "rerun"):
                raise ZeroDivisionError
        return original(*args, **kwargs)

    with monkeypatch.context() as patched:
        wanted = target(model)
        if where in ("block", "rerun"):
            patched.setattr(layer, "forward", broken)
        if where == "head":
            patched.setattr(wanted.head.network, "forward", broken)
        graph = "light" if where == "rerun" else "full"
        patched.setattr(engine("comfy_host.guided.model"), "choose_graph", lambda *_: graph)
        with contextlib.nullcontext() if where == "nowhere" else pytest.raises(ZeroDivisionError):
            guided(name, model, wanted)
    layer.__dict__.pop("forward", None)
    assert state(network) == before
    assert torch.equal(guided(name, model, None), plain)


def target_block(model):
    """The block before the one that is tapped."""
    backbone = engine("comfy_host.loaded.model").backbone_of(model)
    return backbone.blocks[max(backbone.depth - 2, 0)]


@A_FEW
def test_a_lora_is_followed_and_taken_off(name, monkeypatch):
    """The gradient is that of the patched weights."""
    import comfy.lora_convert  # noqa: F401

    model = made(name)
    key = next(key for key in model.model.state_dict() if key.endswith(("qkv.weight", "q.weight")))
    weight = model.model.state_dict()[key]
    patched = model.clone()
    patched.add_patches({key: (torch.randn(weight.shape, generator=torch.Generator().manual_seed(4)) * 0.05,)}, 1.0)
    with_lora, picture = losses(name, patched, target(model), monkeypatch)
    without, plain = losses(name, model, target(model), monkeypatch)
    assert with_lora[-1] != without[-1]
    assert not torch.equal(picture, plain)
    assert torch.equal(losses(name, model, target(model), monkeypatch)[1], plain)


def test_heads_at_several_blocks_read_their_own(monkeypatch):
    model = made("flux")
    early, late = head(model, taps=["double_blocks.1"]), head(model, taps=["single_blocks.2"])
    both = target(model, head=late, previous=target(model, head=early))
    together, _ = losses("flux", model, both, monkeypatch, still=True)
    alone = [losses("flux", model, target(model, head=each), monkeypatch, still=True)[0] for each in (early, late)]
    assert together == pytest.approx([a + b for a, b in zip(*alone, strict=True)], rel=1e-5)


def test_a_head_says_which_block_it_reads_also_from_its_file(tmp_path):
    heads, model = engine("heads"), made("flux")
    saved = head(model, taps=["single_blocks.1"])
    heads.save_head(saved, tmp_path / "head.safetensors")
    loaded = heads.load_head(tmp_path / "head.safetensors")
    assert loaded.spec.taps == ("single_blocks.1",)
    assert engine("comfy_host.loaded.model").tapped_for(model, [loaded]).taps == ("single_blocks.1",)


def test_a_head_of_another_transformer_is_refused():
    """SD3 and SD3.5-M have blocks of one width."""
    errors = engine("errors")
    other = head(made("sd3"))
    with pytest.raises(errors.BackboneError, match="trained on SD3 of 4x128"):
        engine("comfy_host.loaded.model").tapped_for(made("sd3.5-m"), [other])


def test_a_video_is_refused_before_it_is_made():
    name, errors = "wan2.1", engine("errors")
    model = made(name)
    with pytest.raises(errors.ReadoutGuidanceError, match="video of 3 frames"):
        node(
            "RG_ReadoutGuidedKSampler", model=model, seed=0, steps=2, cfg=1.0, sampler_name="euler", scheduler="simple",
            positive=prompt(name, 1), negative=prompt(name, 2), latent_image={"samples": torch.zeros(1, 16, 3, 12, 16)},
            denoise=1.0, target=target(model), strength=1.0, mode="fast", iterations=1, source_cfg=-1.0,
        )  # fmt: skip


def test_a_reference_that_cannot_be_told_from_the_picture_is_refused():
    layouts, errors = engine("features.layouts"), engine("errors")
    with pytest.raises(errors.BackboneError, match="what another picture that it was given adds"):
        layouts.Tokens(exact=True).read(torch.zeros(1, 9, 4), (1, 16, 4, 4), {})


@A_FEW
def test_pictures_are_inverted_and_come_back(name):
    model = made(name)
    picture = {"samples": 0.5 * torch.randn(zero_latent(name).shape, generator=torch.Generator().manual_seed(2))}
    more = {"steps": 12, "scheduler": "simple", "cfg": 1.0}
    inverted, error = node("RG_InvertLatent", model=model, latent=picture, positive=prompt(name, 1), **more)
    back = node(
        "RG_ReadoutGuidedKSampler", model=model, seed=0, sampler_name="euler", positive=prompt(name, 1),
        negative=prompt(name, 2), latent_image=inverted, denoise=1.0, target=None, strength=1.0, mode="fast", iterations=1,
        source_cfg=-1.0, **more,
    )["samples"]  # fmt: skip
    wanted, found = (model.model.process_latent_in(latent) for latent in (picture["samples"], back))
    lost = float((found - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())
    assert lost == pytest.approx(error, rel=0.02, abs=1e-4)


@A_FEW
@pytest.mark.parametrize("block", ["", "0"])
def test_heads_are_trained_on_it(name, block):
    train_and_guide(name, block)


def test_heads_are_trained_on_two_blocks():
    train_and_guide("sd3", "0, 1")


def train_and_guide(name, block):
    model = made(name)
    shape = zero_latent(name, 10).shape
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    controls = torch.rand(10, 24, 32, 1, generator=torch.Generator().manual_seed(2)).expand(-1, -1, -1, 3)
    trained, _, _ = node(
        "RG_TrainReadoutHead", model=model, positive=prompt(name, 1), kind="spatial", steps=3, learning_rate=1e-3,
        batch_size=2, accumulate=1, width="64", sparse=False, shift=0.0, noise_draws=0, precision="fp32",
        validation_share=0.2, validate_every=3, patience=0, seed=0, checkpoint="", latents={"samples": latents},
        targets=controls, block=block,
    )  # fmt: skip
    backbone = engine("comfy_host.loaded.model").backbone_of(model)
    assert trained.spec.taps == (backbone.blocks[: len(block.split(","))] if block else backbone.taps)
    guided(name, model, target(model, head=trained))


def test_the_prompt_is_needed():
    latent = {"samples": zero_latent("sd3")}
    with pytest.raises(engine("errors").TargetError, match="needs a prompt"):
        node("RG_ReadOut", model=made("sd3"), head=head(made("sd3")), latent=latent, noise_percent=0.1, seed=0)


def test_passes_that_only_read_end_at_the_tap():
    model, ran = made("flux"), []
    network = model.model.diffusion_model
    hooks = [block.register_forward_hook(lambda *_: ran.append(1)) for block in network.single_blocks]
    try:
        node("RG_ReadOut", model=model, head=head(model, taps=["double_blocks.1"]), latent={"samples": zero_latent("flux")},
             noise_percent=0.1, seed=0, positive=prompt("flux", 1))  # fmt: skip
    finally:
        for hook in hooks:
            hook.remove()
    assert not ran


def test_every_family_of_the_newest_comfyui_is_there():
    assert find_comfyui().exists()
    assert sum(is_there(name) for name in FAMILIES) >= 17
