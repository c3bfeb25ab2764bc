"""What heads learn from: one number an example, by hand and by what it should prefer."""

from __future__ import annotations

import math

import pytest
import torch
from small_training import KINDS, OUTPUT_CHANNELS, SIZE, examples
from torch.nn import functional as F

from rg_engine.losses import identity_loss
from rg_engine.losses.correspondence import cell_weights
from rg_engine.training import lesson_of
from rg_engine.training.losses import balanced_mse, region_hinge, track_contrast, triplet_hinge

TEMPERATURE = 0.5


def tracks(*points):
    """Tracks (1, P, 2, 2) from (x, y) here, (x, y) there."""
    return torch.tensor([points])


def readouts_of(kind):
    """Random readouts and what is true, of 4 examples."""
    lesson, truth = lesson_of(kind), examples(kind, 4).truth
    return torch.randn(4, lesson.pictures, OUTPUT_CHANNELS.get(kind, 8), *SIZE), truth


# Maps


def test_balanced_mse_counts_background_and_foreground_alike_in_every_picture():
    control = torch.full((2, 1, 1, 4), -0.5)
    control[0, ..., 3] = 0.5
    control[1, ..., 1:] = 0.5
    readout = torch.tensor([[[[0.5, -0.5, -0.5, 0.0]]], [[[0.5, 0.5, 0.5, 0.0]]]])
    expected = torch.tensor([(1 / 3 + 0.25) / 2, (1 + 0.25 / 3) / 2])
    torch.testing.assert_close(balanced_mse(readout, control, background=-0.5), expected)
    torch.testing.assert_close(balanced_mse(readout, control), torch.tensor([1.25 / 4, 1.25 / 4]))


@pytest.mark.parametrize("value", [-0.5, 0.5])
def test_balanced_mse_of_a_control_of_one_kind_is_the_plain_one(value):
    control, readout = torch.full((2, 1, 2, 2), value), torch.rand(2, 1, 2, 2)
    plain = (readout - control).square().flatten(1).mean(1)
    torch.testing.assert_close(balanced_mse(readout, control, background=-0.5), plain)


# Tracks


def test_track_contrast_of_cells_that_are_all_different_is_known():
    cells = torch.eye(4).view(1, 1, 4, 2, 2).expand(1, 2, -1, -1, -1)  # each cell its own direction
    at_centre, between = tracks([[0.25, 0.25]] * 2), tracks([[0.5, 0.25]] * 2)
    expected = math.log(1 + 3 * math.exp(-1 / TEMPERATURE))
    assert track_contrast(cells, at_centre, TEMPERATURE).item() == pytest.approx(expected)
    half_way = 1 / (math.sqrt(2) * TEMPERATURE)  # to both cells; 0 to the other two
    expected = math.log(2 * math.exp(half_way) + 2) - half_way
    assert track_contrast(cells, between, TEMPERATURE).item() == pytest.approx(expected)


def test_track_contrast_is_lowest_where_descriptors_match_at_the_tracks():
    here = torch.randn(1, 16, *SIZE)
    there = here.roll((1, 2), (2, 3))
    points = tracks([[0.3125, 0.4375], [0.5625, 0.5625]], [[0.0625, 0.0625], [0.3125, 0.1875]])
    wrong = points.clone()
    wrong[:, :, 1] = points[:, :, 0]
    found = {
        name: track_contrast(torch.stack([here, other], 1), where, TEMPERATURE).item()
        for name, other, where in (
            ("right", there, points),
            ("wrong", there, wrong),
            ("other", torch.randn_like(here), points),
        )
    }
    assert found["right"] < 0.8 * found["wrong"]
    assert found["right"] < 0.8 * found["other"]


def test_track_contrast_does_not_care_which_picture_comes_first():
    readouts, points = readouts_of("correspondence")
    swapped = track_contrast(readouts.flip(1), points.flip(2), TEMPERATURE)
    torch.testing.assert_close(track_contrast(readouts, points, TEMPERATURE), swapped)


def test_padding_does_not_count_and_an_example_of_nothing_else_is_0_with_a_graph():
    readouts, points = readouts_of("correspondence")
    plain = track_contrast(readouts, points, TEMPERATURE)
    padding = torch.full_like(points[:, :2], math.nan)
    padding[:, 1, 0] = 0.5  # half a point is none
    padded = torch.cat([padding, points], 1)
    padded[1] = math.nan
    readouts.requires_grad_()
    loss = track_contrast(readouts, padded, TEMPERATURE)
    torch.testing.assert_close(loss[[0, 2, 3]], plain[[0, 2, 3]])
    assert loss[1] == 0
    (gradient,) = torch.autograd.grad(loss.sum(), readouts)
    assert not gradient[1].any()
    assert gradient[0].any()
    assert torch.isfinite(gradient).all()


def test_cells_share_a_point_by_its_distance():
    points, (height, width) = torch.rand(40, 2), (3, 5)
    weights = cell_weights(points, (height, width)).view(40, height, width)
    x, y = (points * torch.tensor([width, height]) - 0.5).unbind(1)
    across = (1 - (x.clamp(0, width - 1)[:, None] - torch.arange(width)).abs()).clamp_min(0)
    down = (1 - (y.clamp(0, height - 1)[:, None] - torch.arange(height)).abs()).clamp_min(0)
    torch.testing.assert_close(weights, down[:, :, None] * across[:, None])
    torch.testing.assert_close(weights.sum((1, 2)), torch.ones(40))


# Triplets


def test_the_hinge_is_the_margin_by_which_the_other_is_not_farther():
    right, up = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    diagonal = F.normalize(right + up, dim=0)
    triplets = [(right, right, up), (right, up, right), (right, diagonal, up), (right, 3 * right, 0.1 * right)]
    readouts = torch.stack([torch.stack(three) for three in triplets])[..., None, None].expand(-1, -1, -1, 2, 3)
    expected = torch.tensor([0.0, 0.9 + 1, 0.9 + (1 - math.sqrt(0.5)) - 1, 0.9])
    torch.testing.assert_close(triplet_hinge(readouts, 0.9), expected, atol=1e-6, rtol=0)


def test_the_hinge_measures_each_place_by_itself():
    anchor = torch.tensor([[1.0, 1.0], [0.0, 0.0]]).view(2, 1, 2)
    half = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).view(2, 1, 2)  # as the anchor in the first place, across in the second
    loss = triplet_hinge(torch.stack([anchor, half, anchor])[None], 0.3)
    assert loss.item() == pytest.approx(0.3 + 0.5)


# All kinds


def test_the_hinge_of_regions_compares_places_with_the_mean_of_the_other_region_and_nothing_outside():
    up, right = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])
    maps = torch.stack([up, right, right, up], 1)[:, None]  # (2, 1, 4): what the four places say
    regions = torch.zeros(2, 3, 1, 4)
    regions[0, 0, 0, 0] = regions[0, 1, 0, 3] = regions[0, 2, 0, 1] = 1  # up, up, right: told apart
    regions[1, 0, 0, 0] = regions[1, 1, 0, 1] = 1  # the other's region is empty
    readouts = maps.expand(2, 3, 2, 1, 4).clone()
    near, empty = region_hinge(readouts, regions, 0.5)
    assert (near, empty) == (0, 0)
    regions[0, [1, 2]] = regions[0, [2, 1]]
    assert region_hinge(readouts, regions, 0.5)[0] == pytest.approx(1.5)  # margin + distance 1 - distance 0
    readouts[:, :, :, 0, 2] = 7.0  # a place in no region
    assert region_hinge(readouts, regions, 0.5)[0] == pytest.approx(1.5)


def test_a_region_hinge_is_zero_for_what_the_identity_loss_calls_alike():
    """Training asks for what guidance will: the distance of a region's places to the mean descriptor of the other's."""
    generator = torch.Generator().manual_seed(3)
    readouts = torch.randn(1, 3, 4, 5, 5, generator=generator)
    regions = (torch.rand(1, 3, 5, 5, generator=generator) > 0.5).float()
    one = torch.ones(1)
    distances = [
        identity_loss(
            readouts[:, 0], readouts[:, k], reference_mask=regions[:, k : k + 1], mask=regions[:, :1], z_extent=one
        )
        for k in (1, 2)
    ]
    assert region_hinge(readouts, regions, 3.0) == pytest.approx(3.0 + distances[0] - distances[1], abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_over_parts_of_a_batch_is_the_batch_s(kind):
    readouts, truth = readouts_of(kind)
    loss = lesson_of(kind, background=-0.5 if kind == "spatial" else None).loss
    whole = loss(readouts, truth)
    parts = [loss(readouts[i : i + 2], None if truth is None else truth[i : i + 2]) for i in (0, 2)]
    assert whole.shape == (4,)
    torch.testing.assert_close(torch.cat(parts), whole)


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_is_taken_in_fp32_whatever_the_precision_of_the_readouts(kind):
    readouts, truth = readouts_of(kind)
    readouts = readouts.bfloat16()
    loss = lesson_of(kind).loss
    assert loss(readouts, truth).dtype == torch.float32
    torch.testing.assert_close(loss(readouts, truth), loss(readouts.float(), truth))


def test_temperature_margin_and_background_reach_the_loss():
    readouts, points = readouts_of("correspondence")
    maps, truth = readouts_of("spatial")
    truth[:, :, :6] = -0.5
    triplets, _ = readouts_of("appearance")
    for kind, values, true, more in (
        ("correspondence", readouts, points, {"temperature": 0.3}),
        ("spatial", maps, truth, {"background": -0.5}),
        ("appearance", triplets, None, {"margin": 0.9}),
    ):
        assert not torch.allclose(lesson_of(kind, **more).loss(values, true), lesson_of(kind).loss(values, true))
