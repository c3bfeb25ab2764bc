"""What ``evaluate controlnet`` compares: ComfyUI's ControlNet, trained here, and how colours are read."""

from __future__ import annotations

import pytest
import torch
from comfyui_host import engine

pytestmark = pytest.mark.usefixtures("comfyui")
PICTURES = 8


@pytest.fixture
def world():
    return engine("lab.demo_world").load_world(2)


@pytest.fixture
def training():
    return engine("lab.control.training")


@pytest.fixture
def pairs(world):
    drawn = engine("demo.scene_pictures").scene_pictures(3, PICTURES, True)
    latents = world.vae.encode(drawn.picture).float()
    with torch.inference_mode(False):
        return engine("lab.control.pairs").Pairs(
            latents=latents.clone(), controls=(drawn.pose * 255).byte().clone(), scenes=drawn.scenes
        )


def made(world, control=None):
    start = {"samples": torch.zeros(2, 4, 16, 16)}
    return engine("lab.demo_world").sample(
        world, None, start, prompt="a red figure, grey wall", seed=4, steps=3, control=control
    )


@torch.inference_mode(False)
@torch.enable_grad()
def learned(training, world, pairs, steps, out):
    """A ControlNet before and after some steps, and its loss on one draw each time."""
    settings = training.ControlSettings(steps=steps, batch=PICTURES, learning_rate=3e-3)
    task = training.ControlTraining(pairs, world.clip, settings, out)
    (draw,) = task._draw(10_000)
    losses = [task._losses(*draw).item()]
    network = task.run()
    losses.append(task._losses(*draw).item())
    return network, losses, task.history


def test_before_training_it_is_comfyui_s_own_and_changes_nothing(world, training):
    import comfy.cldm.cldm

    with torch.inference_mode(False):
        unet = engine("comfy_host.demo_model.unet").load_unet("cpu").diffusion_model
        network = training.new_controlnet(unet)
    assert type(network) is comfy.cldm.cldm.ControlNet
    copied = set(network.state_dict()) & set(unet.state_dict())
    assert all(torch.equal(network.state_dict()[key], unet.state_dict()[key]) for key in copied)
    assert {key.split(".")[0] for key in copied} == {"time_embed", "input_blocks", "middle_block"}
    hint = torch.rand(2, 128, 128, 3)
    assert torch.equal(made(world, (training.as_control_net(network), hint)), made(world))


def test_training_lowers_its_loss_moves_pictures_and_goes_on(world, training, pairs, tmp_path):
    out = tmp_path / "pose.safetensors"
    network, (before, after), history = learned(training, world, pairs, 40, out)
    assert after < 0.98 * before
    control = training.as_control_net(network), pairs.controls[:2].float() / 255
    assert not torch.equal(made(world, control), made(world))
    assert not torch.equal(made(world, control), made(world, (control[0], control[1].flip(2))))
    again = training.train_controlnet(pairs, world.clip, training.ControlSettings(steps=40), out)
    assert all(torch.equal(p, q) for p, q in zip(network.parameters(), again.parameters(), strict=True))
    _, _, longer = learned(training, world, pairs, 42, out)
    assert len(longer) == 42
    assert longer[:40] == history
    with pytest.raises(engine("errors").TrainingError, match="42 steps already"):
        learned(training, world, pairs, 41, out)


def test_pairs_are_drawn_once_and_are_the_heads_examples(world, tmp_path, monkeypatch):
    pairs, heads = engine("lab.control.pairs"), engine("lab.demo_heads")
    for module in (pairs, heads):
        monkeypatch.setattr(module, "CHUNK", 4)
    drawn = pairs.draw_pairs(tmp_path, "depth", 6, world.vae, 77)
    times = [path.stat().st_mtime_ns for path in sorted(tmp_path.iterdir())]
    assert len(times) == 2
    examples, scenes = heads.demo_examples(heads.demo_recipe("demo_depth"), 6, world.vae, 77, figure_only=True)
    assert [scene.caption() for scene in drawn.scenes] == [scene.caption() for scene in scenes]
    assert torch.allclose(drawn.latents, examples.latents, atol=1e-4)
    assert torch.allclose(drawn.examples().truth, examples.truth, atol=1 / 255)
    assert len(pairs.draw_pairs(tmp_path, "pose", 8, world.vae, 77)) == 8
    assert [path.stat().st_mtime_ns for path in sorted(tmp_path.iterdir())] == times


def test_colours_of_figures_are_read(world):
    evaluation, colours = engine("lab.evidence.controlnet"), engine("demo.world").COLOURS
    drawn = engine("demo.scene_pictures").scene_pictures(12, 48, True)
    seen = torch.stack([evaluation.figure_is(world, drawn.picture, name) for name in colours], 1)  # (N, colours)
    assert seen.sum(1).eq(1).all()
    true = [list(colours).index(scene.figure.identity.colour) for scene in drawn.scenes]
    assert seen[range(len(true)), true].mean() > 0.95


def test_the_table_measures_every_way_and_keeps_what_is_done(world, tmp_path, monkeypatch):
    evaluation = engine("lab.evidence.controlnet")
    monkeypatch.setattr(engine("lab.control.pairs"), "CHUNK", 6)
    for name, value in (("HEAD_STEPS", 2), ("TURNS", 1), ("STEPS", 2)):
        monkeypatch.setattr(evaluation, name, value)
    plan = evaluation.ControlPlan(work=tmp_path, controls=("depth",), pairs=(4, 6), steps=2)
    rows = evaluation.controlnet_table(world, plan)
    assert [(row["pairs"], row["way"]) for row in rows] == [
        ("", "unguided"), *[(count, way) for count in (4, 6) for way in ("head", "ControlNet", "both")]
    ]  # fmt: skip
    head, network, both = rows[1:4]
    assert network["parameters"] > 2_000_000 > head["parameters"] > 0
    assert both["MiB, weights"] == pytest.approx(head["MiB, weights"] + network["MiB, weights"], abs=0.1)
    assert network["MiB, kept"] == 0 < head["MiB, kept"]
    assert min(row["training, s"] for row in rows[1:]) >= 0
    assert (tmp_path / "controlnet_depth_4.jpg").exists()
    monkeypatch.setattr(evaluation, "_summed", None)  # what is done is not measured again
    assert evaluation.controlnet_table(world, plan) == rows


def test_a_plan_that_can_not_be_is_refused(tmp_path):
    evaluation, errors = engine("lab.evidence.controlnet"), engine("errors")
    for wrong in ({"controls": ("poses",)}, {"pairs": (2,)}, {"steps": 0}):
        with pytest.raises(errors.ReadoutGuidanceError):
            evaluation.ControlPlan(work=tmp_path, **wrong)
