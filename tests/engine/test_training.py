"""Training heads, on a task whose answer is known: the features are a random projection of the control."""

from __future__ import annotations

import json
import math

import pytest
import torch

from rg_engine.errors import ReadoutGuidanceError
from rg_engine.heads import AggregationNetwork, HeadSpec
from rg_engine.training import HeadTraining, balanced_mse, train_heads
from rg_engine.training.loop import log_losses

CHANNELS, SIZE = (8, 6), (8, 8)


def heads_to_train(*, seed=0, count=1, loss=balanced_mse):
    torch.manual_seed(seed)
    return [
        HeadTraining(
            name=f"head {i}",
            loss=loss,
            spec=HeadSpec(kind="spatial", feature_channels=CHANNELS, training={"control": "blobs"}),
            network=AggregationNetwork(CHANNELS, projection_channels=32, hidden=32, emb_width=4, output_channels=2),
        )
        for i in range(count)
    ]


def batch(step):
    generator = torch.Generator().manual_seed(step)
    control = torch.rand(4, 2, *SIZE, generator=generator) - 0.5
    projections = [torch.randn(c, 2, generator=torch.Generator().manual_seed(c)) for c in CHANNELS]
    features = [torch.einsum("cd,bdhw->bchw", p, control) for p in projections]
    return features, torch.randn(4, 4, generator=generator), control


def tensors(heads):
    return [value for head in heads for value in head.network.state_dict().values()]


def test_training_lowers_the_loss_and_returns_frozen_heads():
    losses = []
    (head,) = train_heads(
        heads_to_train(), batch, size=SIZE, steps=80, ema=0.9, learning_rate=3e-3, report=lambda _, each: losses.extend(each)
    )
    features, emb, control = batch(1000)
    error = balanced_mse(head.read(features, emb, SIZE), control)
    assert len(losses) == 80
    assert error < 0.25 * losses[0]
    assert error < 0.5 * control.var()
    assert not any(p.requires_grad for p in head.network.parameters())
    assert head.spec.training == {"control": "blobs", "steps": 80}


def test_training_resumed_from_its_checkpoint_gives_the_same_weights_bit_for_bit(tmp_path):
    whole = train_heads(heads_to_train(count=2), batch, size=SIZE, steps=6)

    def interrupted(step):
        if step == 3:
            raise KeyboardInterrupt
        return batch(step)

    checkpoint = tmp_path / "heads.state"
    with pytest.raises(KeyboardInterrupt):
        train_heads(heads_to_train(count=2), interrupted, size=SIZE, steps=6, checkpoint=checkpoint, checkpoint_every_s=-1.0)
    steps = []
    resumed = train_heads(
        heads_to_train(count=2, seed=1), batch, size=SIZE, steps=6, checkpoint=checkpoint,
        report=lambda step, _: steps.append(step),
    )  # fmt: skip
    assert steps == [3, 4, 5]
    assert all(torch.equal(a, b) for a, b in zip(tensors(whole), tensors(resumed), strict=True))


def test_a_finished_training_is_not_repeated(tmp_path):
    first = train_heads(heads_to_train(), batch, size=SIZE, steps=2, checkpoint=tmp_path / "heads.state")
    again = train_heads(heads_to_train(seed=1), pytest.fail, size=SIZE, steps=2, checkpoint=tmp_path / "heads.state")
    assert all(torch.equal(a, b) for a, b in zip(tensors(first), tensors(again), strict=True))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_training_and_keeps_the_last_checkpoint(tmp_path, value):
    checkpoint = tmp_path / "heads.state"

    def loss(readout, control):
        return balanced_mse(readout, control) * (value if checkpoint.exists() else 1.0)

    with pytest.raises(ReadoutGuidanceError, match=f"'head 0' is {value} at (step )?1"):
        train_heads(heads_to_train(loss=loss), batch, size=SIZE, steps=4, checkpoint=checkpoint, checkpoint_every_s=-1.0)
    state = torch.load(checkpoint, weights_only=True)
    assert state["step"] == 1
    assert all(torch.isfinite(value).all() for value in state["parts"][0].values())


def test_the_returned_head_is_the_moving_average():
    training = heads_to_train()
    average = {}

    def follow(step, _):
        for key, value in training[0].network.state_dict().items():
            average[key] = value.clone() if step == 0 else 0.7 * average[key] + 0.3 * value

    (head,) = train_heads(training, batch, size=SIZE, steps=4, ema=0.7, report=follow)
    torch.testing.assert_close(dict(head.network.state_dict()), average)


def test_losses_are_logged_as_means_of_so_many_steps(tmp_path):
    report = log_losses(tmp_path / "log", every=2)
    for step, losses in enumerate([[1.0, 4.0], [3.0, 8.0], [5.0, 5.0], [6.0, 6.0], [9.0, 9.0]]):
        report(step, losses)
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert lines == [{"step": 2, "loss": [2.0, 6.0]}, {"step": 4, "loss": [5.5, 5.5]}]


def test_balanced_mse_counts_background_and_foreground_alike():
    control = torch.full((1, 1, 1, 4), -0.5)
    control[..., 3] = 0.5
    readout = torch.tensor([[[[0.5, -0.5, -0.5, 0.0]]]])  # errors 1, 0, 0 on the background, 0.5 on the foreground
    assert balanced_mse(readout, control, background=-0.5).item() == pytest.approx((1 / 3 + 0.25) / 2)
    assert balanced_mse(readout, control).item() == pytest.approx((1 + 0.25) / 4)


@pytest.mark.parametrize("value", [-0.5, 0.5])
def test_balanced_mse_of_a_control_of_one_kind_is_the_plain_one(value):
    control, readout = torch.full((1, 1, 2, 2), value), torch.rand(1, 1, 2, 2)
    assert torch.equal(balanced_mse(readout, control, background=-0.5), balanced_mse(readout, control))
