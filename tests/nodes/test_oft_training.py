"""Train OFT on a loaded model: its gradients, the model as it was, what a break leaves, and files for other tools."""

from __future__ import annotations

import pytest
import torch
from comfyui_host import engine, node
from oft_kit import adapter, golden, model, network_output
from safetensors.torch import load_file, save_file
from unchanged import fingerprint, modes

pytestmark = pytest.mark.usefixtures("comfyui")


class Broken(Exception):
    pass


@pytest.fixture
def home(tmp_path):
    """An empty models/oft and output folder of ComfyUI's, for this test only."""
    import folder_paths

    folder = tmp_path / "oft"
    folder.mkdir()
    paths, output = folder_paths.folder_names_and_paths["oft"][0], folder_paths.get_output_directory()
    paths.insert(0, str(folder))
    folder_paths.set_output_directory(str(tmp_path / "output"))
    folder_paths.filename_list_cache.pop("oft", None)
    yield folder
    paths.remove(str(folder))
    folder_paths.set_output_directory(output)
    folder_paths.filename_list_cache.pop("oft", None)


def prompt(rows: int = 1, seed: int = 0):
    return [[torch.randn(rows, 8, 32, generator=torch.Generator().manual_seed(seed)), {}]]


def latents(count: int = 4, seed: int = 1, channels: int = 4):
    return {"samples": torch.randn(count, channels, 16, 16, generator=torch.Generator().manual_seed(seed))}


def train(patcher, **changed):
    """MODEL, OFT, loss plot, report."""
    values = {
        "positive": prompt(), "latents": latents(), "steps": 4, "learning_rate": 1e-2, "batch_size": 2, "blocks": 4,
        "block_size": 0, "coft_eps": 0.0, "layers": "attention", "prior_weight": 1.0, "weight_decay": 0.01, "accumulate": 1,
        "ema": 0.5, "schedule": "cosine", "memory": "full", "precision": "fp32", "validation_share": 0.0, "validate_every":
        2, "preview_every": 0, "seed": 3, "checkpoint": "", **changed,
    }  # fmt: skip
    return node("RG_TrainOFT", model=patcher, **values)


def q_of(oft) -> torch.Tensor:
    return torch.cat([layer.rotation.q.flatten() for layer in oft.layers])


def output(patcher) -> torch.Tensor:
    """The network's output with the patches in force, from weights that no training has left loaded."""
    import comfy.model_management

    comfy.model_management.unload_all_models()
    patcher.patch_model()
    out = network_output(patcher)
    patcher.unpatch_model()
    return out


def error(ours, theirs) -> float:
    return float((ours - theirs).abs().max())


def step(patcher, graph: str = "full", layers: str = "transformers"):
    """Loss and gradient of one step of rotations that turn a little already."""
    learning, training = engine("adapters.learning"), engine("comfy_host.adapters.training.turning")
    frozen_model = engine("comfy_host.loaded.frozen_model")

    @torch.inference_mode(False)
    @torch.enable_grad()
    def work(frozen):
        turns, _ = training.new_turns(frozen.network, learning.OftSettings(layers=layers))
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for v in turns.triangles:
                v.copy_(0.05 * torch.randn(v.shape, generator=generator))
        examples = learning.AdapterExamples(latents=latents()["samples"].clone())
        with training.TurnedModel(frozen, graph) as turned:
            loss = turned.loss(turns, examples.draw(0, 2, range(4), 0), False).mean()
            loss.backward()
        return loss.item(), torch.cat([v.grad.flatten() for v in turns.triangles]), turns

    return frozen_model.with_frozen_model(patcher, prompt(), (2, 4, 16, 16), work, tapped=False)


def by_hand(patcher, turns):
    """The same by autograd through W B^T, with the noise prediction compared with the noise itself."""
    learning, turn = engine("adapters.learning"), engine("adapters").turn
    with torch.inference_mode(False), torch.enable_grad():
        state = {key: value.clone() for key, value in patcher.model.diffusion_model.state_dict().items()}
        turns.zero_grad(set_to_none=True)
        for key, rotation in turns.in_force().items():
            name = f"{key.removeprefix('diffusion_model.')}.weight"
            state[name] = turn(state[name], rotation, "in")
        draw = learning.AdapterExamples(latents=latents()["samples"].clone()).draw(0, 2, range(4), 0)
        sampling = patcher.model.model_sampling
        low, high = float(sampling.sigma_min), float(sampling.sigma_max)
        sigma = torch.tensor([min(max(float(sampling.percent_to_sigma(1 - float(t))), low), high) for t in draw.time])
        clean = draw.latents * 0.18215
        x = clean + draw.noise * sigma.view(-1, 1, 1, 1)
        timestep = sampling.timestep(sigma).float().clone()
        z = x / (1 + sigma**2).sqrt().view(-1, 1, 1, 1)
        given = (z, timestep, prompt()[0][0].clone().expand(2, -1, -1))
        for buffer in patcher.model.diffusion_model.buffers():
            assert not buffer.is_inference()
        predicted = torch.func.functional_call(patcher.model.diffusion_model, state, given)
        loss = (predicted - draw.noise).square().flatten(1).mean(1).mean()
        loss.backward()
        return loss.item(), torch.cat([v.grad.flatten() for v in turns.triangles])


@pytest.mark.parametrize("layers", ["attention", "attention and gates", "transformers"])
def test_loss_and_gradient_are_those_of_turned_weights(layers):
    patcher = model()
    loss, gradient, turns = step(patcher, layers=layers)
    wanted_loss, wanted = by_hand(patcher, turns)
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    assert float((gradient - wanted).norm() / wanted.norm()) < 1e-5


def test_blocks_that_run_twice_give_the_same_gradient():
    patcher = model()
    (loss, gradient, _), (light_loss, light, _) = step(patcher), step(patcher, graph="light")
    assert light_loss == pytest.approx(loss, rel=1e-6)
    assert float((gradient - light).norm() / gradient.norm()) < 1e-5


def flow_transformer():
    """Lumina 2's kind of model, small, with random weights, and a prompt for it."""
    from small_models import patcher

    model = engine("comfy_host.demo_model.transformer").new_transformer()
    engine("lab.cost.models").randomise(model.diffusion_model, seed=0, scale=0.5)
    words = torch.randn(1, 16, 96, generator=torch.Generator().manual_seed(0))
    return patcher(model), [[words, {"attention_mask": torch.ones(1, 16, dtype=torch.long)}]]


def test_a_transformer_of_flows_kind_learns():
    """What it loses with turns in force is what a model with the same adapter on its weights loses."""
    learning, turning = engine("adapters.learning"), engine("comfy_host.adapters.training.turning")
    frozen_model = engine("comfy_host.loaded.frozen_model")
    patcher, positive = flow_transformer()
    before = fingerprint(patcher)

    def losses(on, size: float):
        @torch.inference_mode(False)
        @torch.enable_grad()
        def work(frozen):
            turns, _ = turning.new_turns(frozen.network, learning.OftSettings(layers="attention"))
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for v in turns.triangles:
                    v.copy_(size * torch.randn(v.shape, generator=generator))
            given = learning.AdapterExamples(latents=latents(channels=8)["samples"].clone())
            with turning.TurnedModel(frozen, "full") as turned:
                loss = turned.loss(turns, given.draw(0, 2, range(4), 0), False).mean()
                loss.backward()
            assert all(v.grad is not None and torch.isfinite(v.grad).all() for v in turns.triangles)
            return loss.item(), turns.layers()

        return frozen_model.with_frozen_model(on, positive, (2, 8, 16, 16), work, tapped=False)

    loss, layers = losses(patcher, 0.02)
    plain, _ = losses(patcher, 0.0)
    assert fingerprint(patcher) == before
    oft = engine("adapters").Adapter(layout="here", layers=layers)
    on = node("RG_LoadOFT", model=patcher, file="none", strength=1.0, oft=oft)[0]
    patched, _ = losses(on, 0.0)
    assert abs(loss - plain) > 1e-4
    assert loss == pytest.approx(patched, rel=1e-5)


def test_weights_that_are_cast_learn_alike():
    """fp16 and fp8 in storage, fp32 in arithmetic: as a model that has their values in fp32."""
    for dtype in (torch.float16, torch.float8_e4m3fn):
        stored = model(dtype)
        exact = model()
        state = {key: value.float() for key, value in stored.model.diffusion_model.state_dict().items()}
        exact.model.diffusion_model.load_state_dict(state)
        (loss, gradient, _), (wanted_loss, wanted, _) = step(stored), step(exact)
        assert loss == pytest.approx(wanted_loss, rel=1e-4)
        assert float((gradient - wanted).norm() / wanted.norm()) < 1e-3


def test_layers_that_are_patched_when_they_run_learn_alike():
    """An adapter in low VRAM in force while another one learns."""
    patcher = model()
    oft = train(patcher)[1]
    turned = node("RG_LoadOFT", model=patcher, file="none", strength=1.0, oft=oft)[0]
    wanted_loss, wanted, _ = step(turned)
    turned.patch_model(lowvram_model_memory=1)
    loss, gradient, _ = step(turned)
    turned.unpatch_model()
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    assert float((gradient - wanted).norm() / wanted.norm()) < 1e-4


def test_a_subject_is_learned_and_the_model_is_as_before():
    patcher = model()
    before, before_modes, plain = fingerprint(patcher), modes(), output(patcher)
    with torch.random.fork_rng():
        torch.manual_seed(11)
        state = torch.get_rng_state()
        turned, oft, plot, report = train(patcher, steps=12, learning_rate=0.02, preview_every=6)
        assert torch.equal(torch.get_rng_state(), state)
    assert fingerprint(patcher) == before
    assert modes() == before_modes
    assert patcher.patches == {}
    assert torch.equal(output(patcher), plain)
    assert plot.shape == (1, 400, 720, 3)
    assert len(oft.layers) == 88
    assert error(output(turned), plain) > 1e-3
    drift = float(report.split("neurons ")[1].split("drift ")[1].split(";")[0])
    assert drift < 1e-6
    again = node("RG_LoadOFT", model=patcher, file="none", strength=1.0, oft=oft)[0]
    assert torch.equal(output(again), output(turned))


def test_the_loss_falls():
    learning, train_module = engine("adapters.learning"), engine("comfy_host.adapters.training.train")
    with torch.inference_mode(False):
        examples = learning.AdapterExamples(latents=latents()["samples"].clone())
    settings = learning.OftSettings(
        steps=40, batch=4, learning_rate=0.02, warm_up=1, validate_every=10, validation_share=0.25
    )
    _, history, _ = train_module.train_adapter(model(), examples, settings, positive=prompt())
    first, last = (sum(loss for _, loss, _ in part) / 10 for part in (history[:10], history[-10:]))
    assert last < first
    assert all(check is not None for step, _, check in history if step % 10 == 0)


def test_the_same_seed_gives_the_same_adapter():
    patcher = model()
    first, again, other = (q_of(train(patcher, seed=seed)[1]) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_coft_stays_in_its_ball_and_the_file_says_so_too(home):
    oft = train(model(), coft_eps=1e-4, learning_rate=0.05)[1]
    bound = engine("adapters.limits").coft_bound
    for layer in oft.layers:
        q = layer.rotation.q
        assert float(torch.linalg.matrix_norm(q).max()) <= bound(1e-4, *q.shape[:2]) * 1.0001
    assert oft.facts["coft_eps"] == 1e-4


def test_class_pictures_change_what_is_learned():
    patcher = model()
    prior = {"class_positive": prompt(seed=8), "class_latents": latents(seed=9)}
    assert not torch.equal(q_of(train(patcher)[1]), q_of(train(patcher, **prior)[1]))
    assert torch.equal(q_of(train(patcher)[1]), q_of(train(patcher, **prior, prior_weight=0.0)[1]))


def test_a_prompt_for_each_picture():
    patcher = model()
    one, each = prompt(), [[prompt()[0][0].repeat(4, 1, 1), {}]]
    assert torch.allclose(q_of(train(patcher, positive=one)[1]), q_of(train(patcher, positive=each)[1]), atol=1e-5)


def test_previews_are_shown(monkeypatch):
    import comfy.utils

    shown = {}
    monkeypatch.setattr(
        comfy.utils.ProgressBar,
        "update_absolute",
        lambda self, value, total=None, preview=None: shown.update({value: preview}),
    )
    train(model(), preview_every=2)
    assert shown[1] is None
    kind, picture, _ = shown[2]
    assert kind == "JPEG"
    assert picture.size[0] >= 16


def test_one_picture_is_enough():
    assert torch.isfinite(q_of(train(model(), latents=latents(1))[1])).all()


def test_blocks_that_do_not_divide_are_told():
    _, oft, _, report = train(model(), blocks=5)
    assert "5 blocks don't divide every layer: some have" in report
    assert len(oft.layers) == 88


def test_a_break_is_taken_up_to_the_bit(home, monkeypatch):
    patcher, module = model(), engine("training.loop")
    wanted = q_of(train(patcher, steps=6)[1])
    monkeypatch.setattr(module, "CHECKPOINT_EVERY_S", -1.0)
    frozen = engine("comfy_host.loaded.frozen_model").FrozenModel
    original, calls = frozen.call, []

    def fails_once(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise Broken
        return original(self, *args, **kwargs)

    with monkeypatch.context() as broken:
        broken.setattr(frozen, "call", fails_once)
        with pytest.raises(Broken):
            train(patcher, steps=6, checkpoint="subject")
    assert torch.equal(q_of(train(patcher, steps=6, checkpoint="subject")[1]), wanted)
    assert [path.name for path in home.iterdir()] == ["interrupted_oft.safetensors"]


@pytest.mark.parametrize("stage", ["forward", "backward", "interrupt", "preview"])
def test_whatever_happens_the_model_is_as_before(home, monkeypatch, stage):
    import comfy.model_management

    patcher = model()
    before, before_modes, plain = fingerprint(patcher), modes(), output(patcher)
    turning = engine("comfy_host.adapters.training.turning")
    raised: type[BaseException] | tuple = Broken
    if stage == "interrupt":
        raised = comfy.model_management.InterruptProcessingException
    seen = []

    def fails(*args, **kwargs):
        seen.append(1)
        if stage == "interrupt":
            comfy.model_management.interrupt_current_processing(True)
            comfy.model_management.throw_exception_if_processing_interrupted()
        raise Broken

    with monkeypatch.context() as broken:
        if stage == "preview":
            broken.setattr(turning.TurnedModel, "sample", fails)
        else:
            loss = turning.TurnedModel.loss

            def after_two(self, turns, noisy, of_class):
                seen.append(1)
                if len(seen) > 2 and stage != "backward":
                    fails()
                value = loss(self, turns, noisy, of_class)
                if len(seen) > 2:
                    value.register_hook(fails)
                return value

            broken.setattr(turning.TurnedModel, "loss", after_two)
        with pytest.raises(raised):
            train(patcher, preview_every=2)
    assert fingerprint(patcher) == before
    assert modes() == before_modes
    assert torch.equal(output(patcher), plain)
    assert (home / "interrupted_oft.safetensors").exists()
    kept = node("RG_LoadOFT", model=patcher, file="interrupted_oft.safetensors", strength=1.0)[2]
    assert kept.facts["steps"] == 2


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"latents": latents(channels=8)}, "8 channels and the model works on 4"),
        ({"class_latents": latents()}, "connect class_positive"),
        ({"class_positive": prompt()}, "connect class_latents"),
        ({"class_positive": prompt(), "class_latents": latents(channels=8)}, "make both of one size"),
        ({"positive": prompt(3)}, "3 rows for 4 pictures"),
        ({"positive": [*prompt(), *prompt()]}, "made of 2 prompts"),
        ({"latents": {"samples": torch.full((2, 4, 16, 16), torch.nan)}}, "NaN"),
        ({"validation_share": 0.1}, "is none: raise it"),
        ({"accumulate": 3}, "can't be divided"),
        ({"checkpoint": "../elsewhere"}, "is no file name"),
    ],
)
def test_bad_input(changed, match):
    patcher = model()
    before = fingerprint(patcher)
    with pytest.raises(engine("errors").ReadoutGuidanceError, match=match):
        train(patcher, **changed)
    assert fingerprint(patcher) == before


def test_a_model_without_such_layers():
    turning = engine("comfy_host.adapters.training.turning")
    with pytest.raises(engine("errors").TrainingError, match="no layers of the kind"):
        turning.trainable(torch.nn.Sequential(torch.nn.Conv2d(3, 3, 3)), "attention")


# Saving for others (each exactly, or not at all).


@pytest.fixture
def trained(comfyui):
    patcher = model()
    turned, oft, *_ = train(patcher, learning_rate=0.05, steps=6)
    return patcher, oft, output(turned)


def save(oft, form: str, patcher=None, **changed) -> str:
    return node(
        "RG_SaveOFT", oft=oft, name="subject", format=form, precision="fp32", overwrite=False, model=patcher, **changed
    )


@pytest.mark.parametrize("form", ["native", "authors", "PEFT"])
def test_written_files_mean_the_same(home, trained, form):
    patcher, oft, wanted = trained
    loaded = node("RG_LoadOFT", model=patcher, file=save(oft, form, patcher), strength=1.0)[0]
    assert error(output(loaded), wanted) < 2e-6


def test_fp16_is_still_orthogonal(home, trained):
    patcher, oft, _ = trained
    name = node("RG_SaveOFT", oft=oft, name="small", format="native", precision="fp16", overwrite=False)
    layers = node("RG_LoadOFT", model=patcher, file=name, strength=1.0)[2].layers
    orthogonal = engine("adapters.orthogonal").orthogonality_error
    assert max(orthogonal(layer.rotation.blocks()) for layer in layers) < 1e-6


def test_the_difference_loads_in_stock_comfyui(home, trained):
    import comfy.sd
    import comfy.utils

    patcher, oft, wanted = trained
    path = home / save(oft, "difference", patcher)
    loaded, _ = comfy.sd.load_lora_for_models(patcher, None, comfy.utils.load_torch_file(str(path)), 1.0, 0.0)
    assert error(output(loaded), wanted) < 1e-5


@pytest.mark.parametrize("folder", ["lycoris_diag", "kohya_sd15", "lycoris_boft", "comfyui_trained"])
def test_what_turns_outputs_loads_in_stock_comfyui(home, folder):
    import comfy.sd
    import comfy.utils

    patcher, oft = model(), adapter(folder)
    oft = engine("adapters").Adapter(layout=oft.layout, layers=oft.layers)  # without what ComfyUI adds to biases
    wanted = output(node("RG_LoadOFT", model=patcher, file="none", strength=1.0, oft=oft)[0])
    lora = comfy.utils.load_torch_file(str(home / save(oft, "LyCORIS", patcher)))
    loaded, _ = comfy.sd.load_lora_for_models(patcher, None, lora, 1.0, 0.0)
    assert error(output(loaded), wanted) < 1e-5


@pytest.mark.parametrize(
    ("folder", "form", "match"),
    [
        ("lycoris_diag", "authors", "turns out, and they turn in|attention layers only"),
        ("lycoris_diag", "PEFT", "turns out, and they turn in"),
        ("authors_db_oft", "LyCORIS", "turns in, and they turn out"),
        ("authors_db_oft", "OneTrainer", "polynomial is not this rotation"),
        ("peft_neumann", "authors", "it is a polynomial"),
        ("peft_0_15", "PEFT", "it has magnitudes"),
        ("lycoris_boft", "PEFT", "turns out|butterfly"),
        ("authors_control_oft", "PEFT", "a hint network"),
        ("comfyui_trained", "LyCORIS", "biases and norms"),
        ("kohya_sdxl_names", "LyCORIS", "blocks no larger than their number"),
    ],
)
def test_what_a_format_can_not_hold_is_refused(home, folder, form, match):
    with pytest.raises(engine("errors").AdapterError, match=match):
        save(adapter(folder), form, model())
    assert list(home.iterdir()) == []


@pytest.mark.parametrize("folder", ["onetrainer_oft2", "onetrainer_oft2_share", "peft_neumann", "peft_conv", "peft_share"])
@pytest.mark.parametrize("form", ["native", "OneTrainer", "PEFT"])
def test_polynomials_are_written_as_they_are(home, folder, form):
    patcher = model()
    loaded = node("RG_LoadOFT", model=patcher, file=save(adapter(folder), form, patcher), strength=1.0)[0]
    assert error(output(loaded), golden(folder)["unet.out"]) < 1e-5


@pytest.mark.parametrize(
    "folder", ["lycoris_boft_rescaled", "kohya_sd15", "authors_control_norm", "comfyui_trained", "peft_0_13"]
)
def test_a_native_file_holds_everything(home, folder):
    patcher = model()
    name = save(adapter(folder), "native")
    assert error(output(node("RG_LoadOFT", model=patcher, file=name, strength=1.0)[0]), golden(folder)["unet.out"]) < 1e-5


def test_a_hint_network_survives_a_native_file(home):
    oft = adapter("authors_control_oft")
    again = node("RG_LoadOFT", model=model(), file=save(oft, "native"), strength=1.0)
    assert all(torch.equal(again[2].hint[key], tensor) for key, tensor in oft.hint.items())
    assert again[4] is not None


def test_a_native_file_without_its_metadata(home, trained):
    patcher, oft, _ = trained
    name = save(oft, "native")
    save_file(load_file(home / name), home / name)
    with pytest.raises(engine("errors").AdapterError, match="has lost its metadata"):
        node("RG_LoadOFT", model=patcher, file=name, strength=1.0)


def test_names_are_numbered_and_paths_refused(home, trained):
    _, oft, _ = trained
    assert [save(oft, "native") for _ in range(2)] == ["subject.safetensors", "subject_2.safetensors"]
    with pytest.raises(engine("errors").ReadoutGuidanceError, match="is no file name"):
        node("RG_SaveOFT", oft=oft, name="../subject", format="native", precision="fp32", overwrite=False)
    with pytest.raises(engine("errors").AdapterError, match="connect model"):
        save(oft, "PEFT")


def test_a_full_disk(home, trained, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(engine("adapters.saving"), "save_file", full)
    with pytest.raises(engine("errors").AdapterError, match=r"No space left.*free some space"):
        save(trained[1], "native")
    assert list(home.iterdir()) == []


def test_extracted_from_two_models(trained):
    patcher, oft, wanted = trained
    turned = node("RG_LoadOFT", model=patcher, file="none", strength=1.0, oft=oft)[0]
    found, report = node("RG_ExtractOFT", model=patcher, changed=turned, layers="transformers", blocks=4, block_size=0)
    assert len(found.layers) == 88
    assert "0.0% of the change is no rotation" in report
    assert error(output(node("RG_LoadOFT", model=patcher, file="none", strength=1.0, oft=found)[0]), wanted) < 1e-5
    with pytest.raises(engine("errors").AdapterError, match="same weights"):
        node("RG_ExtractOFT", model=patcher, changed=patcher, layers="attention", blocks=4, block_size=0)


def test_weights_are_read_as_they_are_stored(home, trained):
    """While ComfyUI has patched ones in the model."""
    patcher, oft, _ = trained
    turned = node("RG_LoadOFT", model=patcher, file="none", strength=1.0, oft=oft)[0]
    wanted = load_file(home / save(oft, "difference", patcher))
    report = node("RG_LoadOFT", model=patcher, file="none", strength=1.0, oft=oft)[3]
    turned.patch_model()
    try:
        made = load_file(home / save(oft, "difference", patcher))
        assert all(torch.equal(made[key], tensor) for key, tensor in wanted.items())
        found, _ = node("RG_ExtractOFT", model=patcher, changed=turned, layers="attention", blocks=4, block_size=0)
        assert len(found.layers) == 88
        assert node("RG_LoadOFT", model=patcher, file="none", strength=1.0, oft=oft)[3] == report
    finally:
        turned.unpatch_model()


def test_models_of_two_kinds_can_not_be_compared():
    from small_models import sdxl_model

    with pytest.raises(engine("errors").AdapterError, match="not of one kind"):
        node("RG_ExtractOFT", model=model(), changed=sdxl_model(), layers="attention", blocks=4, block_size=0)


# Other tools read what is written. They are no dependency: where they are not installed, these are skipped.


class Tree(torch.nn.Module):
    """diffusers' module tree of some attention layers, with the model's weights."""

    def __init__(self, patcher, oft) -> None:
        super().__init__()
        names, state = engine("comfy_host.adapters.names").diffusers_names(patcher), patcher.model.state_dict()
        self.keys = {}
        for theirs, ours in names.items():
            if any(f"{layer.key}.weight" == ours for layer in oft.layers):
                weight = state[ours].clone()
                linear = torch.nn.Linear(*reversed(weight.shape), bias=False)
                linear.weight.data.copy_(weight)
                self.put(theirs, linear)
                self.keys[theirs] = ours

    def put(self, name: str, module) -> None:
        *parents, last = name.split(".")
        at = self
        for parent in parents:
            if parent not in at._modules:
                at.add_module(parent, torch.nn.Module())
            at = at._modules[parent]
        at.add_module(last, module)

    def forward(self, x):
        return x


def turned_weights(patcher, oft) -> dict[str, torch.Tensor]:
    found = engine("comfy_host.adapters.apply").fit(oft, patcher)
    state = patcher.model.state_dict()
    return {layer.place[0]: layer.rotation.turn(state[layer.place[0]]).clone() for layer in found.layers}


def test_peft_reads_it(home, trained):
    peft = pytest.importorskip("peft")
    patcher, oft, _ = trained
    folder = (home / save(oft, "PEFT", patcher)).parent
    wanted = turned_weights(patcher, oft)
    with torch.inference_mode(False):
        tree = Tree(patcher, oft)
        keys = dict(tree.keys)
        merged = peft.PeftModel.from_pretrained(tree, str(folder)).merge_and_unload()
        made = dict(merged.named_modules())
    assert len(keys) == 88
    assert max(error(made[theirs].weight, wanted[ours]) for theirs, ours in keys.items()) < 2e-6


def test_lycoris_reads_it(home):
    lycoris = pytest.importorskip("lycoris")
    patcher = model()
    oft = adapter("kohya_sd15")
    layers = engine("comfy_host.adapters.apply").fit(oft, patcher).layers
    layer = engine("adapters").Layer
    oft = engine("adapters").Adapter(
        layout="kohya",
        layers=tuple(layer(key=each.place[0].removesuffix(".weight"), rotation=each.rotation) for each in layers),
    )
    path, wanted = home / save(oft, "LyCORIS", patcher), turned_weights(patcher, oft)
    with torch.inference_mode(False):
        tree = Tree(patcher, oft)
        wrapper, _ = lycoris.create_lycoris_from_weights(1.0, str(path), tree)
        wrapper.merge_to()
        made = {theirs: tree.get_submodule(theirs).weight.detach() for theirs in tree.keys}
    assert len(made) == 88
    assert max(error(made[theirs], wanted[ours]) for theirs, ours in tree.keys.items()) < 2e-6
