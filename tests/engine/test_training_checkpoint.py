"""Checkpoints: a training that breaks off goes on as if it had not, and what was written is never lost."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys

import pytest
import torch
from small_training import BACKBONE, LATENT_CHANNELS, SIZE, examples, read, training

from rg_engine.errors import TrainingError
from rg_engine.training import TrainingSettings, in_a_row, lesson_of, loop, new_head
from rg_engine.training.checkpoint import load_checkpoint, save_checkpoint

WAYS = {
    "plain": {},
    "validated": {"validate_every": 2, "validation_share": 0.25},
    "worse at the end": {"validate_every": 1, "learning_rate": 1.0, "steps": 7, "ema": 0.5},
    "patient": {"validate_every": 1, "learning_rate": 1.0, "steps": 40, "ema": 0.5, "patience": 3},
    "microbatches": {"accumulate": 2},
    "kept features": {"noise_draws": 2, "validate_every": 3},
    "moved": {"shift": 0.2},
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16"},
}
OTHERWISE = {
    "steps": 7, "batch": 2, "learning_rate": 3e-3, "accumulate": 2, "ema": 0.8, "precision": "bf16", "shift": 0.1,
    "noise_draws": 1, "timestep_convention": "reversed", "validation_share": 0.0, "validate_every": 5, "patience": 9,
    "seed": 1,
}  # fmt: skip


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder" / "a head.state"


@pytest.fixture
def _every_step(monkeypatch):
    """Checkpoints are written at every step, not once a minute."""
    monkeypatch.setattr(loop, "CHECKPOINT_EVERY_S", -1.0)


def assert_same(a, b):
    torch.testing.assert_close(dict(a.network.state_dict()), dict(b.network.state_dict()), rtol=0, atol=0)


def never(_):
    pytest.fail("it was finished")


def stop_at(step):
    def report(progress):
        if progress.step == step:
            raise KeyboardInterrupt

    return report


# Going on


@pytest.mark.usefixtures("_every_step")
@pytest.mark.filterwarnings("ignore:.*GradScaler is enabled, but CUDA is not available")
@pytest.mark.parametrize("way", WAYS.values(), ids=list(WAYS))
def test_a_training_broken_off_after_every_step_ends_as_one_in_one_go(path, way):
    whole = training(**way)
    expected = whole.run()
    for step, _, _ in whole.history:
        part = training(**way, checkpoint=path, weights=0 if step == 1 else 5)
        with contextlib.suppress(KeyboardInterrupt):
            part.run(stop_at(step))
        assert part.history == whole.history[:step]
    assert_same(training(**way, checkpoint=path).run(), expected)
    assert_same(part.best(), expected)
    assert part.best().spec == expected.spec
    checks = [check for _, _, check in whole.history if check is not None]
    if "learning_rate" in way:
        assert min(checks) < checks[-1], "the best so far is not the last"


@pytest.mark.usefixtures("_every_step")
@pytest.mark.parametrize("kind", ["keypoint", "lgp", "correspondence", "appearance"])
def test_a_head_of_any_kind_goes_on(path, kind):
    whole, part = training(kind, steps=4), training(kind, steps=4, checkpoint=path)
    expected = whole.run()
    with pytest.raises(KeyboardInterrupt):
        part.run(stop_at(2))
    rest = training(kind, steps=4, checkpoint=path, weights=5)
    assert_same(rest.run(), expected)
    assert rest.history == whole.history


@pytest.mark.parametrize("more", [{}, WAYS["patient"]], ids=["at its end", "out of patience"])
def test_a_finished_training_is_not_repeated(path, more):
    first = training(**more, checkpoint=path)
    expected, again = first.run(), training(**more, checkpoint=path, weights=5, reading=never)
    assert_same(again.run(never), expected)
    assert again.history == first.history


def test_without_a_checkpoint_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    training(steps=1).run()
    assert not list(tmp_path.iterdir())


# Checkpoints that do not fit


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(TrainingSettings)])
def test_a_checkpoint_of_another_setting_is_refused_by_its_name(path, name):
    training(checkpoint=path, steps=1).run()
    before = path.read_bytes()
    with pytest.raises(TrainingError, match=rf"'a head.state' belongs to another training .*\b{name} .* then, .* now"):
        training(checkpoint=path, **{"steps": 1, name: OTHERWISE[name]}).run()
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("kind", "given", "words"),
    [
        ("keypoint", None, "kind 'spatial' then, 'keypoint' now"),
        ("spatial", examples(count=13), "examples 12 then, 13 now"),
        ("lgp", examples("lgp"), "kind"),
    ],
)
def test_a_checkpoint_of_another_head_or_other_examples_is_refused(path, kind, given, words):
    training(checkpoint=path, steps=1).run()
    with pytest.raises(TrainingError, match=words):
        training(kind, given=given, checkpoint=path, steps=1).run()


def test_a_checkpoint_of_a_head_of_other_sizes_is_refused(path):
    training(checkpoint=path, steps=1).run()
    wider = new_head("spatial", BACKBONE, name="a head", output_channels=2, projection=64)
    with pytest.raises(TrainingError, match=r"a head\.state"):
        training(head=wider, checkpoint=path, steps=1).run()


def test_a_checkpoint_cut_off_anywhere_is_refused(path):
    save_checkpoint(path, {"settings": {"steps": 3}, "weights": torch.rand(300)})
    content = path.read_bytes()
    for length in range(0, len(content), 41):
        path.write_bytes(content[:length])
        with pytest.raises(TrainingError, match="can't be read: delete it"):
            load_checkpoint(path, {"steps": 3})


@pytest.mark.parametrize(
    "content",
    [b"garbage", b"PK\x03\x04garbage", b"\x80\x02.", b"\x80\x02}.", b"\x80\x02K\x01a.", bytes(range(256))],
    ids=lambda content: repr(content)[:20],
)
def test_a_file_of_something_else_is_refused(tmp_path, content):
    path = tmp_path / "a.state"
    path.write_bytes(content)
    with pytest.raises(TrainingError, match=r"'a\.state' (can't be read|is no checkpoint).*delete it"):
        load_checkpoint(path, {})


@pytest.mark.parametrize("saved", [[1], {}, {"version": 2}, {"version": 1}, {"version": 1, "settings": 3}, torch.ones(2)])
def test_a_pytorch_file_of_something_else_is_refused(tmp_path, saved):
    torch.save(saved, tmp_path / "a.state")
    with pytest.raises(TrainingError, match=r"'a\.state' is no checkpoint of this version"):
        load_checkpoint(tmp_path / "a.state", {})


def test_a_state_is_read_as_it_was_written(path):
    state = {"settings": {"steps": 3}, "weights": torch.rand(3), "best": None, "history": [(1, 0.5, None)], "loss": math.inf}
    assert load_checkpoint(path, {"steps": 3}) is None
    save_checkpoint(path, state)
    found = load_checkpoint(path, {"steps": 3})
    assert torch.equal(found.pop("weights"), state.pop("weights"))
    assert {key: found[key] for key in state} == state
    assert [file.name for file in path.parent.iterdir()] == ["a head.state"], "nothing unfinished is left"


# What can go wrong while writing


@pytest.mark.usefixtures("_every_step")
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_leaves_the_last_checkpoint_byte_for_byte(path, value):
    lesson, kept = lesson_of("spatial"), []

    def loss(readouts, truth):
        return lesson.loss(readouts, truth) * (value if len(kept) == 3 else 1.0)

    broken = training(checkpoint=path, lesson=dataclasses.replace(lesson, loss=loss))
    with pytest.raises(TrainingError, match=f"is {value} at step 3.*The last checkpoint is as it was"):
        broken.run(lambda _: kept.append(path.read_bytes()))
    assert path.read_bytes() == kept[-1]
    assert_same(training(checkpoint=path).run(), training().run())


@contextlib.contextmanager
def a_full_disk(room_bytes):
    """No file can grow beyond so many bytes: the system's own error, at a real write."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on the size of files")
@pytest.mark.usefixtures("_every_step")
@pytest.mark.parametrize("room_bytes", [0, 20_000])
def test_a_full_disk_ends_it_in_words_and_the_checkpoint_of_before_still_serves(path, room_bytes):
    with pytest.raises(KeyboardInterrupt):
        training(checkpoint=path).run(stop_at(2))
    before = path.read_bytes()
    assert len(before) > room_bytes
    reported = []
    with (
        a_full_disk(room_bytes),
        pytest.raises(
            TrainingError, match=r"'a head\.state' can't be written .*: free some space.*The one of before is still"
        ),
    ):
        training(checkpoint=path).run(reported.append)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["a head.state"]
    assert not reported
    assert_same(training(checkpoint=path).run(), training().run())


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on the size of files")
def test_a_full_disk_at_the_first_checkpoint_leaves_nothing_behind_but_the_head(path):
    learner = training(checkpoint=path, steps=2)
    with a_full_disk(1000), pytest.raises(TrainingError, match="Nothing was written"):
        learner.run()
    assert not list(path.parent.iterdir())
    assert_same(learner.best(), training(steps=2).run())


def test_a_folder_that_is_a_file_is_told(path):
    path.parent.write_text("in the way")
    with pytest.raises(TrainingError, match=r"'a head\.state' can't be written .*choose another folder"):
        save_checkpoint(path, {"settings": {}})


def test_a_training_does_not_depend_on_what_else_a_checkpoint_s_folder_holds(path):
    path.parent.mkdir()
    path.with_name(path.name + ".partial").write_bytes(b"left by a crash")
    training(checkpoint=path, steps=1).run()
    assert load_checkpoint(path, {})["step"] == 1


def test_the_model_is_asked_for_the_features_of_kept_examples_again_after_a_break(path, monkeypatch):
    """Features are not in the checkpoint: they are read again, and the weights come out the same."""
    monkeypatch.setattr(loop, "CHECKPOINT_EVERY_S", -1.0)
    given, asked = in_a_row("lgp", torch.randn(4, LATENT_CHANNELS, *SIZE), torch.randn(4, LATENT_CHANNELS, *SIZE)), []
    with pytest.raises(KeyboardInterrupt):
        training("lgp", given=given, checkpoint=path, noise_draws=1).run(stop_at(3))
    rest = training("lgp", given=given, checkpoint=path, noise_draws=1, reading=lambda d: asked.append(d.keys) or read(d))
    assert_same(rest.run(), training("lgp", given=given, noise_draws=1).run())
    assert len(asked) == 1
