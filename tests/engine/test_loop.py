"""The loop by itself, on a line whose slope is known. What it does for heads is in test_training_*.py."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

from rg_engine.errors import TrainingError
from rg_engine.training.loop import LoopSettings, Training

SLOPE = torch.tensor([1.0, -2.0, 0.5])


def a_training(network=None, *, compute_loss=None, checkpoint=None, **settings):
    """A linear layer that learns a slope."""
    network = nn.Linear(3, 1) if network is None else network
    settings = LoopSettings(**{"steps": 6, "learning_rate": 0.1, "warm_up": 1, **settings})

    def draw(step):
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        for part in x.chunk(settings.accumulate):
            yield part, part @ SLOPE

    def error(x, y):
        return (network(x)[:, 0].float() - y).square()

    return Training(network, draw, compute_loss or error, settings, name="a line", facts={"slope": 3}, checkpoint=checkpoint)


def weights(network):
    return torch.cat([p.detach().flatten().clone() for p in network.parameters()])


@pytest.mark.parametrize("decay", [0.9985, 0.2])
def test_a_young_average_forgets_the_first_steps_sooner(decay):
    network, averages, expected = nn.Linear(3, 1), [], None
    training = a_training(network, ema=decay, young_ema=True)

    def report(progress):
        nonlocal expected
        kept = min(decay, progress.step / (9 + progress.step))  # (1 + n) / (10 + n) after n steps
        expected = weights(network) if expected is None else kept * expected + (1 - kept) * weights(network)
        averages.append((weights(training.best()), expected))

    training.run(report)
    for average, by_hand in averages:
        torch.testing.assert_close(average, by_hand)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.filterwarnings("ignore:.*GradScaler is enabled, but CUDA is not available")
def test_a_gradient_s_norm_is_clipped_before_the_step(precision):
    """A gradient far below AdamW's epsilon hardly moves anything; any other moves each weight by the learning rate."""
    moves = {}
    for clip in (1e-10, 1e10):
        network = nn.Linear(3, 1)
        before = weights(network)

        def compute_loss(x, y, network=network):
            return 1e-3 * (network(x)[:, 0].float() - y).square()  # small: fp16's first scale skips no step

        a_training(network, compute_loss=compute_loss, clip=clip, steps=1, precision=precision).run()
        moves[clip] = (weights(network) - before).abs().max().item()
    assert moves[1e10] == pytest.approx(0.1, rel=0.01)
    assert 0 < moves[1e-10] < 0.002


def test_an_adapter_learns_on_a_frozen_backbone_that_stays_out_of_its_checkpoints(tmp_path):
    backbone, adapter = nn.Linear(3, 3, bias=False).requires_grad_(False), nn.Linear(3, 1)
    nn.init.orthogonal_(backbone.weight)
    before = weights(backbone)

    def compute_loss(x, y):
        return (adapter(backbone(x))[:, 0] - y).square()

    training = a_training(adapter, compute_loss=compute_loss, checkpoint=tmp_path / "an adapter.state", steps=80)
    training.run()
    assert training.history[-1][1] < 0.05 * training.history[0][1]
    assert torch.equal(weights(backbone), before)
    state = torch.load(tmp_path / "an adapter.state", weights_only=True)
    assert state["network"].keys() == adapter.state_dict().keys()


def test_a_clipped_training_with_a_young_average_goes_on_to_the_bit(tmp_path, monkeypatch):
    monkeypatch.setattr("rg_engine.training.loop.CHECKPOINT_EVERY_S", -1.0)
    way = {"young_ema": True, "clip": 0.5, "accumulate": 2, "weight_decay": 0.01, "precision": "bf16"}

    def network():
        torch.manual_seed(1)
        return nn.Linear(3, 1)

    def stop(progress):
        if progress.step == 3:
            raise KeyboardInterrupt

    whole, parts = a_training(network(), **way), [a_training(network(), checkpoint=tmp_path / "a", **way) for _ in range(2)]
    whole.run()
    with contextlib.suppress(KeyboardInterrupt):
        parts[0].run(stop)
    parts[1].run()
    assert torch.equal(weights(parts[1].best()), weights(whole.best()))
    assert parts[1].history == whole.history


@pytest.mark.parametrize("name", ["steps", "learning_rate", "warm_up", "accumulate", "clip"])
def test_what_no_training_can_be_is_refused(name):
    with pytest.raises(TrainingError, match=f"{name} is 0"):
        LoopSettings(**{"steps": 1, "learning_rate": 1.0, name: 0})
