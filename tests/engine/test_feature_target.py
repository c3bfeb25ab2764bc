"""Where features should go for a readout to be what is asked for."""

from __future__ import annotations

import math

import pytest
import torch

from rg_engine.guidance import feature_target
from rg_engine.guidance.feature_target import feature_gap


@pytest.fixture
def maps():
    """Features of two pictures, in two maps of other sizes."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 4, 4, generator=generator), torch.randn(2, 5, 2, 2, generator=generator)]


@pytest.fixture
def goals(maps):
    """Not far from the features."""
    return [
        map_ + 0.2 * torch.randn(map_.shape, generator=torch.Generator().manual_seed(k)) for k, map_ in enumerate(maps, 1)
    ]


def of(loss):
    """Evaluates loss(maps), (B,), with its gradients."""

    def evaluate(maps):
        leaves = [map_.detach().clone().requires_grad_() for map_ in maps]
        each = loss(leaves)
        return each.detach(), list(torch.autograd.grad(each.sum(), leaves))

    return evaluate


def squares(goals, weights=(1.0, 1.0)):
    def loss(maps):
        errors = [(a - b).square().flatten(1).sum(1) for a, b in zip(maps, goals, strict=True)]
        return torch.stack([w * e for w, e in zip(weights, errors, strict=True)]).sum(0)

    return loss


def gap_of(maps, loss, steps):
    evaluate = of(loss)
    return feature_gap(maps, evaluate(maps), evaluate, steps)


def test_one_step_is_the_gradient_over_its_square_times_the_loss(maps, goals):
    loss, gradients = of(squares(goals))(maps)
    squared = sum(g.flatten(1).square().sum(1) for g in gradients)
    for found, gradient in zip(gap_of(maps, squares(goals), 1), gradients, strict=True):
        torch.testing.assert_close(found, (loss / squared)[:, None, None, None] * gradient)


def test_a_loss_that_stays_far_from_zero_sends_features_no_further_than_a_part_of_themselves(maps, goals):
    loss = squares(goals)
    (gap, rest), norm = gap_of(maps, lambda at: loss(at) + 1e6, 1), feature_target.LONGEST
    size = (maps[0].flatten(1).square().sum(1) + maps[1].flatten(1).square().sum(1)).sqrt()
    found = (gap.flatten(1).square().sum(1) + rest.flatten(1).square().sum(1)).sqrt()
    torch.testing.assert_close(found, norm * size)


def test_many_steps_find_where_the_loss_is_zero(maps, goals):
    """Of unlike curvatures, where the gradient points elsewhere."""
    gap = gap_of(maps, squares(goals, (1.0, 0.2)), 60)
    for found, map_, goal in zip(gap, maps, goals, strict=True):
        torch.testing.assert_close(found, map_ - goal, atol=1e-3, rtol=1e-3)


def test_what_multiplies_the_loss_changes_nothing(maps, goals):
    base = squares(goals, (1.0, 0.2))
    for a, b in zip(gap_of(maps, base, 4), gap_of(maps, lambda m: 1e-3 * base(m), 4), strict=True):
        torch.testing.assert_close(a, b)


def test_each_picture_goes_by_itself(maps, goals):
    both = gap_of(maps, squares(goals, (1.0, 0.2)), 3)
    alone = gap_of([m[:1] for m in maps], squares([g[:1] for g in goals], (1.0, 0.2)), 3)
    for a, b in zip(both, alone, strict=True):
        torch.testing.assert_close(a[:1], b)


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_a_picture_whose_loss_says_nothing_stays_and_the_others_go(maps, goals, value):
    factor = torch.tensor([value, 1.0])
    base = squares(goals, (1.0, 0.2))
    for found, expected in zip(gap_of(maps, lambda m: factor * base(m), 3), gap_of(maps, base, 3), strict=True):
        assert torch.equal(found[0], torch.zeros_like(found[0]))
        torch.testing.assert_close(found[1], expected[1])


def test_features_stay_as_they_are(maps, goals):
    before = [map_.clone() for map_ in maps]
    gap_of(maps, squares(goals), 3)
    assert all(torch.equal(a, b) for a, b in zip(maps, before, strict=True))
