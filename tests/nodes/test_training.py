"""Heads trained in a graph: they learn, are saved, loaded and steer, and the model stays as it was."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from comfyui_host import engine, node
from small_models import sdxl_model

pytestmark = pytest.mark.usefixtures("comfyui")

KINDS = ("spatial", "keypoint", "lgp", "correspondence", "appearance")
SETTINGS = {
    "kind": "spatial", "steps": 4, "learning_rate": 2e-3, "batch_size": 2, "accumulate": 1, "width": "64", "sparse": True,
    "shift": 0.0, "noise_draws": 0, "precision": "fp32", "validation_share": 0.25, "validate_every": 2, "patience": 0,
    "seed": 0, "checkpoint": "",
}  # fmt: skip
DRAG = '{"version": 1, "drags": [{"from": [0.3, 0.5], "to": [0.7, 0.5]}]}'
BAD_NAMES = ("../x", "a/b", "a\\b", "C:x", "..", ".hidden", "x.", "x\0y", "/x", "x" * 200)


class Broken(Exception):
    pass


@pytest.fixture
def home(tmp_path, monkeypatch):
    """ComfyUI's folders, for this test only: heads/ (the first of readout_heads) and output/ lie in it."""
    import folder_paths

    folders = engine("comfy_host.folders")
    (tmp_path / "heads").mkdir()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, folders.FOLDER, ([str(tmp_path / "heads")], folders.EXTENSIONS))
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    folder_paths.filename_list_cache.pop(folders.FOLDER, None)
    yield tmp_path
    folder_paths.filename_list_cache.pop(folders.FOLDER, None)


@pytest.fixture
def demo() -> SimpleNamespace:
    """The demo model, encode(text), latents(pictures) and draw(target or None, mode)."""
    import nodes

    model, clip, vae = node("RG_LoadDemoModel")

    def encode(text: str) -> Any:
        return nodes.CLIPTextEncode().encode(clip, text)[0]

    def latents(pictures: torch.Tensor) -> Any:
        return nodes.VAEEncode().encode(vae, pictures)[0]

    def draw(target: Any = None, mode: str = "fast") -> torch.Tensor:
        inputs = {
            "model": model, "seed": 4, "steps": 5, "cfg": 3.0, "sampler_name": "euler_ancestral", "scheduler": "normal",
            "positive": encode("a red figure, grey wall"), "negative": encode(""),
            "latent_image": nodes.EmptyLatentImage().generate(128, 128, 1)[0], "denoise": 1.0,
        }  # fmt: skip
        if target is None:
            samples = nodes.KSampler().sample(**inputs)[0]
        else:
            more = {"strength": 1.0, "mode": mode, "iterations": 1, "source_cfg": -1.0}
            samples = node("RG_ReadoutGuidedKSampler", **inputs, target=target, **more)
        return nodes.VAEDecode().decode(vae, samples)[0]

    return SimpleNamespace(model=model, vae=vae, encode=encode, latents=latents, draw=draw)


@pytest.fixture
def lesson(small) -> SimpleNamespace:
    """Random latents and control pictures for the small model: train(**changed inputs), plain(), calls of the model."""
    import comfy.model_management

    generator = torch.Generator().manual_seed(8)
    latents = {"samples": torch.randn(6, 4, 8, 8, generator=generator)}
    targets = torch.rand(6, 32, 32, 3, generator=generator)
    calls: list[int] = []
    network = small.model.model.diffusion_model
    hook = network.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))

    def train(**inputs: Any) -> Any:
        """The head, the loss plot, the readouts."""
        given = {"model": small.model, "positive": small.positive, "latents": latents, "targets": targets, **SETTINGS}
        return node("RG_TrainReadoutHead", **{**given, **inputs})

    def plain() -> torch.Tensor:
        return small.plain(latent_image={"samples": torch.zeros(1, 4, 8, 8)}, steps=2)

    yield SimpleNamespace(train=train, plain=plain, calls=calls, latents=latents, targets=targets)
    hook.remove()
    comfy.model_management.interrupt_current_processing(False)


def scenes(kind: str, count: int, seed: int = 3) -> SimpleNamespace:
    """Training data of a kind as Demo Scene gives it."""
    sequence = {"correspondence": "pairs", "appearance": "triplets"}.get(kind, "scenes")
    names = ("picture", "pose", "depth", "edges", "caption", "keypoints", "tracks", "figure")
    drawn = node("RG_DemoScene", seed=seed, count=count, figure_only=kind != "appearance", sequence=sequence)
    return SimpleNamespace(**dict(zip(names, drawn, strict=True)))


def truth_of(kind: str, drawn: SimpleNamespace, demo: SimpleNamespace) -> Any:
    """What goes into targets."""
    given = {"spatial": drawn.pose, "keypoint": drawn.keypoints, "correspondence": drawn.tracks, "appearance": None}
    return demo.latents(drawn.edges) if kind == "lgp" else given[kind]


def target_of(kind: str, head: Any, demo: SimpleNamespace) -> Any:
    """A Readout Target for a head of a kind, as its help page has it."""
    wanted = scenes("spatial", 1, seed=50)
    needed = {
        "spatial": {"image": wanted.pose},
        "keypoint": {"readout": wanted.keypoints},
        "lgp": {"reference_latent": demo.latents(wanted.edges)},
        "correspondence": {"drag_points": node("RG_DragPoints", points=DRAG)[0]},
        "appearance": {"reference_latent": demo.latents(wanted.picture)},
    }[kind]
    return node("RG_ReadoutTarget", head=head, weight=1.0, start_percent=0.0, end_percent=0.7, **needed)


def weights(head: Any) -> dict[str, torch.Tensor]:
    return dict(head.network.state_dict())


def assert_same_weights(one: Any, other: Any) -> None:
    torch.testing.assert_close(weights(one), weights(other), rtol=0, atol=0)


def at_read(number: int, act: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``act`` happen when features are taken from the model for the ``number``-th time."""
    tap = engine("features.tap").FeatureTap
    take, taken = tap.take, []

    def counted(self):
        taken.append(self)
        if len(taken) == number:
            act()
        return take(self)

    monkeypatch.setattr(tap, "take", counted)


def interrupt() -> None:
    """As the page's button does: the step goes on, the next one does not begin."""
    import comfy.model_management

    comfy.model_management.interrupt_current_processing()


def fail() -> None:
    raise Broken


def refused(match: str):
    return pytest.raises(engine("errors").ReadoutGuidanceError, match=match)


def everything_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# From pictures to a guided picture


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_of_each_kind_learns_is_saved_loaded_and_steers(home, demo, caplog, kind):
    drawn = scenes(kind, 12)
    inputs = {"model": demo.model, "positive": demo.encode(""), "latents": demo.latents(drawn.picture)}
    changed = {"kind": kind, "steps": 24, "learning_rate": 1e-2, "batch_size": 4, "validate_every": 8}
    with caplog.at_level("INFO", "readout_guidance"):
        head, plot, readouts = node(
            "RG_TrainReadoutHead", **inputs, **{**SETTINGS, **changed}, targets=truth_of(kind, drawn, demo)
        )
    validations = [float(value) for value in re.findall(rf"Training {kind}, .* validation (\S+)", caplog.text)]
    assert len(validations) == 3
    assert validations[-1] < validations[0]
    assert plot.shape == (1, 400, 720, 3)
    assert readouts.std() > 0.02, "the preview shows nothing"

    name = node("RG_SaveReadoutHead", head=head, name="mine", overwrite=False)
    loaded = node("RG_LoadReadoutHead", head_name=name, kind="auto")
    assert loaded.spec.kind == kind
    assert_same_weights(loaded, head)
    guided = demo.draw(target_of(kind, loaded, demo), mode="norm_ratio" if kind == "lgp" else "fast")
    assert torch.isfinite(guided).all()
    assert (guided - demo.draw()).abs().mean() > 1e-3


def test_images_with_a_vae_train_as_their_latents_do(demo):
    drawn = scenes("spatial", 6)
    inputs = {"model": demo.model, "positive": demo.encode(""), "targets": drawn.depth, **SETTINGS}
    from_latents, _, _ = node("RG_TrainReadoutHead", **inputs, latents=demo.latents(drawn.picture))
    from_images, _, _ = node("RG_TrainReadoutHead", **inputs, images=drawn.picture, vae=demo.vae)
    assert_same_weights(from_latents, from_images)
    assert from_images.output_channels == 1, "grey pictures are one channel"


def test_settings_reach_the_training(lesson):
    changed = {
        "steps": 3,
        "learning_rate": 1e-3,
        "batch_size": 4,
        "accumulate": 2,
        "shift": 0.1,
        "noise_draws": 2,
        "seed": 9,
    }
    head, _, _ = lesson.train(**changed, width="128")
    trained = {"batch" if key == "batch_size" else key: value for key, value in changed.items()}
    assert {key: head.spec.training[key] for key in trained} == trained
    assert head.network.projection_channels == 128


def test_sparse_changes_what_is_learned_from_mostly_black_pictures(lesson):
    black = lesson.targets * (lesson.targets > 0.9)
    balanced, plain = (lesson.train(targets=black, sparse=sparse)[0] for sparse in (True, False))
    assert any(not torch.equal(value, weights(plain)[key]) for key, value in weights(balanced).items())


# The model stays as it was


def fingerprint(model: Any) -> list:
    """Every parameter and buffer by its bytes, hooks and replaced forwards, and what is attached to the model."""
    network, found = model.model, []
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        digest = hashlib.sha256(tensor.detach().clone().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        found.append((name, id(tensor), tensor.requires_grad, tensor.is_inference(), digest))
    for name, module in network.named_modules():
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        found.append((name, *map(len, hooks), module.training, "forward" in module.__dict__))
    attached = (
        model.wrappers, model.callbacks, model.model_options, model.patches, model.object_patches, model.hook_patches,
    )  # fmt: skip
    return [*found, *(repr(each) for each in attached)]


def modes() -> tuple[bool, bool]:
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled()


BREAKS = {
    "success": (None, None),
    "error": (fail, "Broken"),
    "interrupt": (interrupt, "InterruptProcessingException"),
}


@pytest.mark.parametrize(
    ("kind", "how"), [("spatial", "success"), ("lgp", "success"), ("spatial", "error"), ("spatial", "interrupt")]
)
def test_the_model_is_as_before(small, lesson, home, kind, how):
    plain = lesson.plain()
    act, error = BREAKS[how]
    inputs = {"kind": kind, "targets": lesson.latents if kind == "lgp" else lesson.targets}
    prompt, before, before_modes = small.positive[0][0].clone(), fingerprint(small.model), modes()
    with pytest.MonkeyPatch.context() as monkeypatch:
        if act is None:
            lesson.train(**inputs)
        else:
            at_read(2, act, monkeypatch)
            with pytest.raises(BaseException) as caught:  # noqa: PT011 (newer interrupts are no Exception)
                lesson.train(**inputs)
            assert caught.type.__name__ == error
    assert fingerprint(small.model) == before
    assert modes() == before_modes
    assert torch.equal(small.positive[0][0], prompt)
    assert torch.equal(lesson.plain(), plain)


def test_an_error_while_the_head_learns_leaves_the_model_as_before(small, lesson, home, monkeypatch):
    before, before_modes = fingerprint(small.model), modes()
    with monkeypatch.context() as patched:
        patched.setattr(engine("heads.aggregation").AggregationNetwork, "forward", lambda *_, **__: fail())
        with pytest.raises(Broken):
            lesson.train()
    assert (fingerprint(small.model), modes()) == (before, before_modes)
    assert everything_in(home) == ["heads"], "nothing was learned, so nothing is kept"


# Interrupted and continued


@pytest.mark.parametrize(("number", "act", "error"), [(3, interrupt, "InterruptProcessingException"), (4, fail, "Broken")])
def test_a_training_that_breaks_off_leaves_its_best_head(small, lesson, home, monkeypatch, number, act, error):
    at_read(number, act, monkeypatch)
    with pytest.raises(BaseException) as caught:  # noqa: PT011 (newer interrupts are no Exception)
        lesson.train(validate_every=0)
    assert caught.type.__name__ == error
    assert everything_in(home) == ["heads", "heads/interrupted_spatial.safetensors"]
    head = node("RG_LoadReadoutHead", head_name="interrupted_spatial.safetensors", kind="auto")
    assert (head.spec.kind, head.spec.training["steps"]) == ("spatial", 3)
    target = node("RG_ReadoutTarget", head=head, weight=1.0, start_percent=0.0, end_percent=0.6, image=small.control)
    assert torch.isfinite(small.sample(target, steps=2)).all()


def test_a_second_interrupted_training_of_a_kind_replaces_the_first(lesson, home):
    for last in (2, 3):
        with pytest.MonkeyPatch.context() as monkeypatch:
            at_read(last, fail, monkeypatch)
            with pytest.raises(Broken):
                lesson.train(kind="lgp", targets=lesson.latents, validate_every=0)
    assert everything_in(home) == ["heads", "heads/interrupted_lgp.safetensors"]
    head = node("RG_LoadReadoutHead", head_name="interrupted_lgp.safetensors", kind="auto")
    assert (head.spec.kind, head.spec.training["steps"]) == ("lgp", 2)


def test_an_interrupt_stays_one_where_the_head_cannot_be_saved(lesson, home, monkeypatch):
    import comfy.model_management

    (home / "heads").rmdir()
    (home / "heads").write_text("a file where the folder should be")
    at_read(3, interrupt, monkeypatch)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        lesson.train(validate_every=0)


def test_an_interrupt_before_the_first_step_leaves_nothing(lesson, home, monkeypatch):
    import comfy.model_management

    interrupt()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        lesson.train(checkpoint="mine")
    assert everything_in(home) == ["heads"]
    assert lesson.calls == []


@pytest.mark.parametrize(("number", "act"), [(3, interrupt), (4, fail)])
def test_a_training_goes_on_from_its_checkpoint_to_the_same_head(lesson, home, number, act):
    inputs = {"steps": 6, "validate_every": 0, "learning_rate": 1e-2, "shift": 0.1}
    whole, _, _ = lesson.train(**inputs)
    lesson.calls.clear()
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(engine("training.loop"), "CHECKPOINT_EVERY_S", -1.0)  # after every step
        at_read(number, act, monkeypatch)
        with pytest.raises(BaseException):  # noqa: B017, PT011 (newer interrupts are no Exception)
            lesson.train(**inputs, checkpoint="mine")
    assert everything_in(home / "output") == ["readout_heads", "readout_heads/mine.checkpoint"]
    lesson.calls.clear()
    resumed, _, _ = lesson.train(**inputs, checkpoint="mine")
    assert len(lesson.calls) == 3, "the first half is not learned again"
    assert_same_weights(resumed, whole)


def test_a_checkpoint_of_another_training_is_told(lesson, home):
    lesson.train(checkpoint="mine")
    lesson.calls.clear()
    with refused("'mine.checkpoint' belongs to another training .*learning_rate 0.002 then, 0.01 now"):
        lesson.train(checkpoint="mine", learning_rate=1e-2)
    assert lesson.calls == []


# Names


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_checkpoint_is_no_path(lesson, home, name):
    with refused("is no file name"):
        lesson.train(checkpoint=name)
    assert lesson.calls == []
    assert everything_in(home) == ["heads"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["", " ", ".safetensors", *BAD_NAMES])
def test_a_head_is_not_saved_under_a_path(small, home, name, overwrite):
    with refused("is no file name"):
        node("RG_SaveReadoutHead", head=small.head("spatial"), name=name, overwrite=overwrite)
    assert everything_in(home) == ["heads"]


def test_saved_heads_of_one_name_are_numbered_or_replaced(small, home):
    def save(head: str, overwrite: bool, name: str = "my head") -> str:
        return node("RG_SaveReadoutHead", head=small.head(head), name=name, overwrite=overwrite)

    def kind(name: str) -> str:
        return node("RG_LoadReadoutHead", head_name=name, kind="auto").spec.kind

    assert [save("spatial", False) for _ in range(3)] == [
        "my head.safetensors", "my head_2.safetensors", "my head_3.safetensors",
    ]  # fmt: skip
    assert save("appearance", True, "my head.safetensors") == "my head.safetensors"
    assert [kind(name) for name in ("my head.safetensors", "my head_2.safetensors")] == ["appearance", "spatial"]
    assert len(everything_in(home / "heads")) == 3


# Refused before the model runs


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"latents": 3, "targets": 3}, "3 examples are too few .*give 4 or more"),
        ({"targets": 5}, r"targets have shape \(5, 3, 8, 8\) for 6 examples"),
        ({"latents": torch.zeros(6, 8, 8, 8)}, "latents have 8 channels and the model works on 4"),
        ({"latents": torch.full((6, 4, 8, 8), torch.nan)}, "latents hold NaN"),
        ({"latents": None}, "nothing to learn from: connect latents"),
        ({"latents": None, "images": torch.zeros(6, 128, 128, 3)}, "nothing to learn from: connect latents"),
        ({"targets": None}, "a spatial head needs targets: one map for each picture"),
        ({"targets": torch.zeros(6, 5, 16, 16)}, "a spatial head learns from pictures"),
        ({"kind": "lgp", "targets": None}, "a lgp head needs targets"),
        ({"kind": "keypoint", "targets": torch.full((6, 5, 16, 16), torch.inf)}, "targets hold NaN or infinite"),
        ({"kind": "correspondence", "targets": None}, "needs targets: point tracks"),
        ({"kind": "correspondence", "targets": torch.full((3, 9, 2, 2), 1.5)}, "tracks go from 1.5 to 1.5, outside"),
        ({"kind": "correspondence", "targets": torch.full((3, 9, 2, 2), torch.nan)}, "no point in any of the tracks"),
        ({"kind": "correspondence", "targets": torch.zeros(6, 9, 2, 2)}, "for 3 examples of a correspondence head"),
        ({"kind": "correspondence", "latents": 5, "targets": torch.zeros(2, 9, 2, 2)}, "5 pictures can't be divided by 2"),
        ({"kind": "appearance", "latents": 5, "targets": None}, "triplets .* 5 pictures can't be divided by 3"),
        ({"kind": "appearance", "targets": 5}, "there are 5 masks for 6 pictures"),
        ({"batch_size": 3, "accumulate": 2}, "a batch of 3 can't be divided into 2"),
    ],
)  # fmt: skip
def test_what_cannot_be_learned_from_is_refused_before_the_model_runs(lesson, home, changed, words):
    def inputs(name: str, value: Any) -> Any:
        if isinstance(value, int) and name in ("latents", "targets"):  # so many of what there is
            value = (lesson.targets if name == "targets" else lesson.latents["samples"])[:value]
        return {"samples": value} if name == "latents" and value is not None else value

    with refused(words):
        lesson.train(**{name: inputs(name, value) for name, value in changed.items()})
    assert lesson.calls == []
    assert everything_in(home) == ["heads"]


def prompts(*rows: int, **options: Any) -> list:
    """A CONDITIONING of entries with so many prompts."""
    generator = torch.Generator().manual_seed(4)
    return [[torch.randn(count, 8, 32, generator=generator), dict(options)] for count in rows]


@pytest.mark.parametrize(
    "positive",
    [prompts(3), prompts(1, 1), prompts(1, area=(4, 4, 0, 0), strength=1.0), prompts(1, start_percent=0.5, end_percent=1.0)],
    ids=["3 for 6 pictures", "two at once", "of a part", "of a part of the time"],
)
def test_a_prompt_that_is_not_one_for_all_or_one_a_picture(lesson, home, positive):
    with refused("prompt"):
        lesson.train(positive=positive, steps=6)
    assert lesson.calls == []


def test_an_lgp_head_takes_encoded_edges_not_pictures(lesson, home):
    with refused("VAE Encode"):
        lesson.train(kind="lgp")
    assert lesson.calls == []


# The frozen model


def read(model: Any, positive: Any, shape: tuple[int, ...], time: torch.Tensor, rows: Any = slice(None), **more: Any) -> Any:
    """Features of random pictures (of which ``rows`` are read) at parts of the diffusion time."""
    pictures, noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    frozen = engine("comfy_host.loaded.frozen_model")
    return frozen.with_frozen_model(
        model, positive, (1, *shape[1:]), lambda loaded: loaded.read(pictures[rows], noise[rows], time[rows], **more)
    )


@pytest.mark.parametrize("family", ["SD1.5", "SDXL"])
def test_of_a_prompt_for_each_picture_every_picture_gets_its_own(small, family):
    """Also SDXL's pooled part."""
    model, width = (small.model, 32) if family == "SD1.5" else (sdxl_model(), 64)
    generator = torch.Generator().manual_seed(2)
    words = torch.randn(4, 8, width, generator=generator)
    pooled = torch.randn(4, 1280, generator=generator)
    shape, time = (2, 4, 8, 8), torch.tensor([0.3, 0.8])
    both = read(model, [[words, {"pooled_output": pooled}]], shape, time, pictures=torch.tensor([2, 0]))
    for i, row in enumerate((2, 0)):
        alone = read(model, [[words[row][None], {"pooled_output": pooled[row][None]}]], shape, time, rows=slice(i, i + 1))
        for one, other in zip(both.features, alone.features, strict=True):
            torch.testing.assert_close(one[i], other[0], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(both.emb[i], alone.emb[0])
    others = read(model, [[words, {"pooled_output": pooled}]], shape, time, pictures=torch.tensor([1, 3]))
    assert not torch.allclose(both.features[-1], others.features[-1], rtol=1e-2, atol=1e-2)


def test_a_reversed_timestep_changes_the_embedding_only(small):
    shape, time = (2, 4, 8, 8), torch.tensor([0.25, 0.9])
    plain, turned = (read(small.model, small.positive, shape, time, reversed_timestep=each) for each in (False, True))
    for one, other in zip(plain.features, turned.features, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(plain.noise_level, turned.noise_level)
    assert not torch.allclose(plain.emb, turned.emb, atol=1e-2)
    torch.testing.assert_close(turned.emb, read(small.model, small.positive, shape, 1 - time).emb, rtol=1e-3, atol=1e-3)


def test_features_are_ordinary_tensors_without_a_graph(small):
    reading = read(small.model, small.positive, (2, 4, 8, 8), torch.tensor([0.0, 1.0]))
    for tensor in (*reading.features, reading.emb, reading.noise_level):
        assert not tensor.is_inference()
        assert not tensor.requires_grad
        assert torch.isfinite(tensor).all()
    assert reading.noise_level[0] < 0.05 < 0.95 < reading.noise_level[1]
