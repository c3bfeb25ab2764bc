"""Where features should go for a readout to be what is asked for."""

from __future__ import annotations

import math

import pytest
import torch

from rg_engine.guidance import feature_target
from rg_engine.guidance.feature_target import feature_gap


@pytest.fixture
def features():
    """Of two pictures."""
    return torch.randn(2, 68, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def goals(features):
    """Not far from the features."""
    return features + 0.2 * torch.randn(features.shape, generator=torch.Generator().manual_seed(1))


def of(loss):
    """Evaluates loss(features), (B,), with its gradient."""

    def evaluate(features):
        leaf = features.detach().clone().requires_grad_()
        each = loss(leaf)
        return each.detach(), torch.autograd.grad(each.sum(), leaf)[0]

    return evaluate


def squares(goals, weight=1.0):
    """The weight is of the last third of the features."""
    weights = torch.where(torch.arange(goals.shape[1]) < 48, 1.0, weight)
    return lambda features: (weights * (features - goals).square()).sum(1)


def gap_of(features, loss, steps):
    evaluate = of(loss)
    return feature_gap(features, evaluate(features), evaluate, steps)


def test_one_step_is_the_gradient_over_its_square_times_the_loss(features, goals):
    loss, gradient = of(squares(goals))(features)
    expected = (loss / gradient.square().sum(1))[:, None] * gradient
    torch.testing.assert_close(gap_of(features, squares(goals), 1), expected)


def test_a_loss_that_stays_far_from_zero_sends_features_no_further_than_a_part_of_themselves(features, goals):
    loss = squares(goals)
    gap = gap_of(features, lambda at: loss(at) + 1e6, 1)
    torch.testing.assert_close(gap.norm(dim=1), feature_target.LONGEST * features.norm(dim=1))


def test_many_steps_find_where_the_loss_is_zero(features, goals):
    """Of unlike curvatures, where the gradient points elsewhere."""
    gap = gap_of(features, squares(goals, 0.2), 60)
    torch.testing.assert_close(gap, features - goals, atol=1e-3, rtol=1e-3)


def test_what_multiplies_the_loss_changes_nothing(features, goals):
    base = squares(goals, 0.2)
    torch.testing.assert_close(gap_of(features, base, 4), gap_of(features, lambda at: 1e-3 * base(at), 4))


def test_each_picture_goes_by_itself(features, goals):
    both = gap_of(features, squares(goals, 0.2), 3)
    torch.testing.assert_close(both[:1], gap_of(features[:1], squares(goals[:1], 0.2), 3))


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_a_picture_whose_loss_says_nothing_stays_and_the_others_go(features, goals, value):
    factor = torch.tensor([value, 1.0])
    base = squares(goals, 0.2)
    found, expected = gap_of(features, lambda at: factor * base(at), 3), gap_of(features, base, 3)
    assert torch.equal(found[0], torch.zeros_like(found[0]))
    torch.testing.assert_close(found[1], expected[1])


def test_features_stay_as_they_are(features, goals):
    before = features.clone()
    gap_of(features, squares(goals), 3)
    assert torch.equal(features, before)
