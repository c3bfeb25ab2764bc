"""What ``evaluate oft`` scores: the subject and the prompt, on pixels."""

from __future__ import annotations

import pytest
import torch
from comfyui_host import engine, node
from oft_kit import model

pytestmark = pytest.mark.usefixtures("comfyui")


@pytest.fixture
def evaluation():
    return engine("lab.evidence.oft")


def test_the_subject_is_like_itself_and_nobody_else(evaluation):
    pictures, caption = node("RG_DemoSubject", seed=evaluation.SEED, count=8)
    assert pictures.shape == (8, 128, 128, 3)
    assert caption.startswith("a teal figure, ")
    expected = evaluation.colour_shares(pictures)
    unseen, _ = node("RG_DemoSubject", seed=evaluation.SEED + 1, count=16)
    others = engine("demo.scene_pictures").scene_pictures(11, 32).picture
    assert float(evaluation.likeness(unseen, expected).mean()) > 0.75
    assert float(evaluation.likeness(others, expected).mean()) < 0.03


def test_walls_and_solids_are_seen(evaluation):
    world = engine("demo.world")
    drawn = engine("demo.scene_pictures").scene_pictures(12, 32)
    for picture, scene in zip(drawn.picture, drawn.scenes, strict=True):
        assert bool(evaluation.wall_is(picture[None], scene.wall))
        assert not any(bool(evaluation.wall_is(picture[None], other)) for other in world.WALLS if other != scene.wall)
        for solid in scene.solids:
            share = float(evaluation.near(picture[None], world.COLOURS[solid.colour]).mean())
            assert share > evaluation.SOLID_SHARE / 2


def test_a_lora_of_the_comparison_begins_as_the_model_itself(evaluation):
    low_rank, learning = engine("lab.evidence.low_rank"), engine("adapters.learning")
    frozen_model = engine("comfy_host.loaded.frozen_model")

    @torch.inference_mode(False)
    @torch.enable_grad()
    def work(frozen):
        method = evaluation.Method(name="LoRA", rate=1e-3, rank=2)
        settings = learning.OftSettings()
        draw = learning.AdapterExamples(latents=torch.randn(2, 4, 16, 16)).draw(0, 2, range(2), 0)
        losses = []
        for chosen in (method, evaluation.Method(name="OFT", rate=1e-3)):
            learner, turned = evaluation._learner(frozen, chosen, settings)
            with turned:
                loss = turned.loss(learner, draw, False).mean()
                loss.backward()
            losses.append(loss.item())
            assert any(float(p.grad.abs().max()) > 0 for p in learner.parameters() if p.grad is not None)
        return losses

    prompt = [[torch.randn(1, 8, 32), {}]]
    lora, oft = frozen_model.with_frozen_model(model(), prompt, (2, 4, 16, 16), work, tapped=False)
    assert lora == pytest.approx(oft, rel=1e-6)
    assert low_rank.LowRank({"a": (3, 5)}, rank=2, seed=0).in_force()["a"][0].shape == (2, 5)
