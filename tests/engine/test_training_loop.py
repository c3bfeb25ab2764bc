"""The training loop, on a task whose answer is known."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from small_training import BACKBONE, KINDS, SIZE, examples, read, settings, training

from rg_engine.errors import TrainingError
from rg_engine.heads import ReadoutHead
from rg_engine.training import lesson_of, new_head
from rg_engine.training.data.draws import draw_validation
from rg_engine.training.plot import loss_plot


def weights(head: ReadoutHead) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in head.network.state_dict().items()}


def loss_of(head, kind, given):
    """A head's loss on all of ``given``, at the validation's noise."""
    draw = draw_validation(given, settings())
    reading = read(draw)
    readouts = head.read(reading.features, reading.emb, SIZE, reading.noise_level)
    return lesson_of(kind).loss(readouts.unflatten(0, draw.latents.shape[:2]), draw.truth).mean().item()


def head_of(kind="spatial"):
    return new_head(kind, BACKBONE, name="a head", output_channels=2 if kind == "spatial" else 0, projection=32)


def follow(head, ema):
    """Follows a head's moving average by hand: ``report`` for a training, and the list of averages that it fills."""
    averages = []

    def report(_):
        now = weights(head)
        if averages:
            now = {key: ema * averages[-1][key] + (1 - ema) * now[key] for key in now}
        averages.append(now)

    return report, averages


# Learning


def test_a_head_is_frozen_before_and_after_it_is_trained():
    for head in (head_of(), training(head=head_of(), steps=1).run()):
        assert not head.network.training
        assert not any(parameter.requires_grad for parameter in head.network.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_learning_lowers_the_loss_also_on_examples_never_seen(kind):
    learner, unseen = training(kind, given=examples(kind, 80), steps=30, batch=6, learning_rate=3e-2), examples(kind, 16)
    before = loss_of(learner.best(), kind, unseen)
    head = learner.run()
    first, last = (sum(loss for _, loss, _ in part) for part in (learner.history[:5], learner.history[-5:]))
    assert last < 0.7 * first
    assert loss_of(head, kind, unseen) < 0.8 * before
    assert [step for step, _, _ in learner.history] == list(range(1, 31))


def test_a_trained_head_is_frozen_on_the_cpu_and_says_how_it_was_trained():
    head = training(steps=3, seed=3, timestep_convention="reversed", validate_every=2).run()
    assert not head.network.training
    assert not any(p.requires_grad for p in head.network.parameters())
    assert {p.device.type for p in head.network.parameters()} == {"cpu"}
    assert (head.name, head.spec.kind, head.spec.timestep_convention) == ("a head", "spatial", "reversed")
    facts = {key: head.spec.training[key] for key in ("control", "steps", "examples", "batch", "learning_rate", "seed")}
    assert facts == {"control": "cells", "steps": 3, "examples": 11, "batch": 4, "learning_rate": 2e-3, "seed": 3}


def test_a_trained_head_does_not_change_when_its_training_goes_on():
    learner, kept = training(steps=4), []
    learner.run(lambda _: kept.append((learner.best(), weights(learner.best()))))
    for head, then in kept:
        assert all(torch.equal(value, then[key]) for key, value in head.network.state_dict().items())
    assert [head.spec.training["steps"] for head, _ in kept] == [1, 2, 3, 4]


def test_without_validation_the_trained_head_is_the_moving_average():
    head = head_of()
    report, averages = follow(head, 0.7)
    torch.testing.assert_close(weights(training(head=head).run(report)), averages[-1])


def test_the_learning_rate_warms_up_and_falls_to_0():
    """With one step of AdamW at a time, weights move by at most about the learning rate."""
    head, moves = head_of(), []
    last = weights(head)

    def report(_):
        nonlocal last
        now = weights(head)
        moves.append(max((now[key] - last[key]).abs().max().item() for key in now))
        last = now

    training(head=head, steps=40, batch=1, learning_rate=1e-3).run(report)
    assert moves[0] == pytest.approx(1e-3 / 50, rel=0.05)
    assert moves[0] < moves[5] < moves[20]
    assert max(moves[36:]) < 0.2 * max(moves)
    assert moves[-1] < 5e-6


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.filterwarnings("ignore:.*GradScaler is enabled, but CUDA is not available")
def test_weights_stay_fp32_in_every_precision_and_learn_nearly_the_same(precision):
    exact, learner = training(steps=4), training(steps=4, precision=precision)
    expected, head = exact.run(), learner.run()
    assert {p.dtype for p in head.network.parameters()} == {torch.float32}
    losses, wanted = ([loss for _, loss, _ in each.history] for each in (learner, exact))
    assert losses != wanted
    assert losses == pytest.approx(wanted, rel=0.02)
    torch.testing.assert_close(weights(head), weights(expected), rtol=0, atol=1e-3)


def test_losses_are_taken_in_fp32_also_where_the_head_computes_in_less():
    lesson, inside = lesson_of("correspondence"), []

    def loss(readouts, truth):
        inside.append(torch.is_autocast_enabled("cpu"))
        return lesson.loss(readouts, truth)

    training("correspondence", lesson=dataclasses.replace(lesson, loss=loss), steps=1, precision="bf16").run()
    assert inside == [False]


# Microbatches


@pytest.mark.parametrize("kind", ["spatial", "correspondence", "appearance"])
@pytest.mark.parametrize("more", [{}, {"noise_draws": 2, "shift": 0.2}])
def test_microbatches_give_the_weights_and_losses_of_one_batch(kind, more):
    whole, parts = (training(kind, steps=3, accumulate=n, learning_rate=1e-2, **more) for n in (1, 4))
    expected = weights(whole.run())
    torch.testing.assert_close(weights(parts.run()), expected, rtol=0, atol=2e-5)
    assert [loss for _, loss, _ in parts.history] == pytest.approx([loss for _, loss, _ in whole.history], rel=1e-4)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_model_never_sees_more_than_a_microbatch(accumulate):
    sizes = set()

    def reading(draw):
        sizes.add(len(draw.latents))
        return read(draw)

    training(reading=reading, accumulate=accumulate, steps=2, validate_every=1, given=examples(count=40)).run()
    assert max(sizes) == 4 // accumulate


# Validation


def test_validation_is_the_average_s_loss_on_the_examples_kept_back():
    head, given = head_of(), examples(count=40)
    report, averages = follow(head, 0.7)
    learner = training(head=head, given=given, validate_every=2, steps=5, validation_share=0.25)
    learner.run(report)
    assert [step for step, _, check in learner.history if check is not None] == [2, 4, 5]
    _, kept_back = given.split(0.25)
    for step, _, check in learner.history:
        average = copy.deepcopy(head.network)
        average.load_state_dict(averages[step - 1])
        expected = loss_of(dataclasses.replace(head, network=average.eval()), "spatial", kept_back)
        assert check is None or check == pytest.approx(expected)


def diverging(**more):
    """A training that gets better for some steps, then worse."""
    return training(learning_rate=1.0, validate_every=1, validation_share=0.25, **{"steps": 40, **more})


def test_the_trained_head_is_the_best_validated_average():
    head = head_of()
    report, averages = follow(head, 0.7)
    learner = diverging(head=head, steps=12)
    trained = learner.run(report)
    checks = [check for _, _, check in learner.history]
    best = checks.index(min(checks))
    assert 0 < best < 11, "the last one is not the best one"
    torch.testing.assert_close(weights(trained), averages[best])


def test_patience_ends_a_training_that_no_longer_gets_better():
    learner = diverging(patience=3)
    learner.run()
    checks = [check for _, _, check in learner.history]
    assert len(checks) == checks.index(min(checks)) + 1 + 3 < 40


def test_progress_tells_the_loss_and_shows_readouts_where_it_validates():
    learner, news = training(steps=5, validate_every=2, given=examples(count=40), validation_share=0.25), []
    learner.run(news.append)
    assert [(each.step, each.loss, each.validation) for each in news] == learner.history
    assert {each.steps for each in news} == {5}
    assert [each.shown is not None for each in news] == [False, True, False, True, True]
    first, last = news[1].shown, news[4].shown
    assert first[0].shape == last[0].shape == (4, 2, *SIZE)
    assert not torch.equal(first[0], last[0])
    assert torch.equal(first[1], last[1]), "always the same pictures"
    assert torch.equal(first[1], examples(count=40).split(0.25)[1].truth[:4])


def test_with_nothing_kept_back_every_example_is_learned_from():
    seen = []
    learner = training(reading=lambda draw: seen.extend(draw.pictures[:, 0].tolist()) or read(draw), steps=3)
    learner.run()
    assert sorted(seen) == list(range(12))
    assert all(check is None for _, _, check in learner.history)


# What ends a training


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_it_before_the_weights_are_touched(value):
    head, lesson, seen = head_of(), lesson_of("spatial"), []

    def loss(readouts, truth):
        return lesson.loss(readouts, truth) * (value if len(seen) == 2 else 1.0)

    learner = training(head=head, lesson=dataclasses.replace(lesson, loss=loss))
    with pytest.raises(TrainingError, match=rf"the loss of 'a head' is {value} at step 2: lower the learning rate"):
        learner.run(lambda _: seen.append(weights(head)))
    torch.testing.assert_close(weights(head), seen[-1], rtol=0, atol=0)
    assert all(torch.isfinite(value).all() for value in weights(learner.best()).values())
    assert len(learner.history) == 2


def test_a_gradient_that_is_not_finite_ends_it_before_the_weights_are_touched():
    head, lesson = head_of(), lesson_of("spatial")

    def loss(readouts, truth):
        return lesson.loss(readouts, truth) + (0 * readouts).sqrt().sum()  # 0, with a slope of NaN

    before = weights(head)
    with pytest.raises(TrainingError, match="a head"):
        training(head=head, lesson=dataclasses.replace(lesson, loss=loss)).run()
    torch.testing.assert_close(weights(head), before, rtol=0, atol=0)


def test_what_report_raises_ends_it_and_leaves_the_best_head_so_far():
    learner = training()

    def report(progress):
        if progress.step == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        learner.run(report)
    expected = []
    other = training()
    other.run(lambda _: expected.append(weights(other.best())))
    torch.testing.assert_close(weights(learner.best()), expected[1], rtol=0, atol=0)


# The plot


def dots(picture, colour):
    """How many pixels are of about a colour (0..255)."""
    return ((picture[0] * 255 - torch.tensor(colour)).abs().amax(-1) < 12).sum().item()


HISTORY = [(step, 2.0 / step, 3.0 / step if step % 5 == 0 else None) for step in range(1, 41)]


@pytest.mark.parametrize(
    "history",
    [
        [],
        [(1, 0.5, None)],
        [(1, 0.5, 0.5)],
        [(1, math.nan, math.inf), (2, math.inf, math.nan), (3, 0.0, -1.0)],
        [(1, 0.3, None), (2, math.nan, None), (3, 0.3, 0.3)],
        [(step, 1e-30 * 10**step, None) for step in range(1, 61)],
        HISTORY,
    ],
    ids=["empty", "one step", "one validation", "no numbers", "equal", "steep", "plain"],
)
def test_a_plot_is_a_picture_whatever_the_history(history):
    picture = loss_plot(history, "pose")
    assert (picture.shape, picture.dtype) == ((1, 400, 720, 3), torch.float32)
    assert 0 <= picture.min() < picture.max() <= 1


def test_a_plot_shows_losses_in_grey_and_validations_in_red():
    grey, red = (150, 160, 175), (214, 72, 50)
    both, losses = loss_plot(HISTORY), loss_plot([(step, loss, None) for step, loss, _ in HISTORY])
    assert dots(losses, grey) > 200
    assert dots(losses, red) == 0
    assert dots(both, red) > 200


def test_a_falling_loss_falls_from_left_to_right():
    red = torch.tensor((214, 72, 50))
    picture = loss_plot([(step, 1.0, 10.0 / step) for step in range(1, 41)])[0] * 255
    rows, columns = ((picture - red).abs().amax(-1) < 12).nonzero().unbind(1)
    assert rows[columns < columns.median()].float().mean() < rows[columns > columns.median()].float().mean()
