"""The losses against the paper's formulas, written out the long way."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from rg_engine.losses import appearance_loss, correspondence_loss, matching_loss, spatial_loss
from rg_engine.losses.correspondence import gather
from rg_engine.losses.matching import TEMPERATURE

SIZE = (5, 4)  # latent cells (H, W)


@pytest.fixture
def maps():
    """Two random maps, (3, 6, 5, 4) in float64, and z's extents (3,)."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 3, 6, *SIZE, generator=generator, dtype=torch.float64)
    return a, b, torch.tensor([5.0, 7.5, 9.0], dtype=torch.float64)


def points_of(cells):
    """The centres of cells (row, column) as (x, y) fractions."""
    return torch.tensor([[(column + 0.5) / SIZE[1], (row + 0.5) / SIZE[0]] for row, column in cells])


STARTS, ENDS = [(0, 1), (3, 2), (4, 0)], [(2, 2), (4, 3), (0, 0)]


def spatial(readout, other, extent, mask=None):
    return spatial_loss(readout, other, control_range=(-0.5, 1.0), z_extent=extent, mask=mask)


def appearance(readout, other, extent, mask=None):
    return appearance_loss(readout, other, z_extent=extent, mask=mask)


def correspondence(readout, other, extent):
    return correspondence_loss(readout, other, starts=points_of(STARTS), ends=points_of(ENDS))


def matching(readout, other, extent):
    return matching_loss(readout, other, starts=points_of(STARTS), ends=points_of(ENDS))


def test_spatial_is_the_squared_error_after_mapping_both_to_the_extremes_of_z(maps):
    readout, control, _ = maps
    z = torch.randn(3, 4, *SIZE, dtype=torch.float64)
    low, high = z.flatten(1).amin(1), z.flatten(1).amax(1)

    def mapped(value):
        share = (value - -0.5) / (1.0 - -0.5)
        return share * (high - low)[:, None, None, None] + low[:, None, None, None]

    expected = torch.stack([F.mse_loss(a, b) for a, b in zip(mapped(readout), mapped(control), strict=True)])
    torch.testing.assert_close(spatial(readout, control, high - low), expected)


def test_appearance_is_the_mean_cosine_distance_times_the_squared_extent_of_z(maps):
    readout, reference, extent = maps
    unit, other = (value / value.norm(dim=1, keepdim=True) for value in (readout, reference))
    expected = (1 - (unit * other).sum(1)).mean((1, 2)) * extent**2
    torch.testing.assert_close(appearance(readout, reference, extent), expected)


def test_correspondence_is_what_the_full_matrix_of_similarities_gives_at_the_points(maps):
    readout, source, _ = maps
    columns = [value.flatten(2) / value.flatten(2).norm(dim=1, keepdim=True) for value in (source, readout)]
    similarity = (torch.einsum("bdm,bdn->bmn", *columns) + 1) / 2  # (B, H*W of the source, H*W of the readout)
    start, end = (torch.tensor([row * SIZE[1] + column for row, column in cells]) for cells in (STARTS, ENDS))
    expected = -0.5 * similarity[:, start, end].mean(1) + 0.5 * similarity[:, start, start].mean(1)
    ours = correspondence_loss(readout, source, starts=points_of(STARTS), ends=points_of(ENDS))
    torch.testing.assert_close(ours, expected)


def test_matching_is_the_cross_entropy_of_both_directions_of_the_full_matrix(maps):
    readout, source, _ = maps
    columns = [value.flatten(2) / value.flatten(2).norm(dim=1, keepdim=True) for value in (source, readout)]
    similarity = torch.einsum("bdm,bdn->bmn", *columns) / TEMPERATURE  # (B, H*W of the source, H*W of the readout)
    start, end = (torch.tensor([row * SIZE[1] + column for row, column in cells]) for cells in (STARTS, ENDS))
    forth, back = similarity.softmax(2)[:, start, end], similarity.softmax(1)[:, start, end]
    expected = -(forth.log().mean(1) + back.log().mean(1)) / 2 / math.log(SIZE[0] * SIZE[1])
    torch.testing.assert_close(matching(readout, source, None), expected)


def test_matching_asks_for_one_place_and_no_other():
    """The paper's loss is as content with a thing that is at its goal and in a third place."""
    thing, ground = torch.eye(6, dtype=torch.float64)[:2]
    source, moved, twice = (ground[:, None, None].repeat(1, *SIZE) for _ in range(3))
    for each, cells in ((source, STARTS[:1]), (moved, ENDS[:1]), (twice, [ENDS[0], (4, 0)])):
        for row, column in cells:
            each[:, row, column] = thing
    points = {"starts": points_of(STARTS[:1]), "ends": points_of(ENDS[:1])}
    at_goal, at_two = (correspondence_loss(each[None], source[None], **points) for each in (moved, twice))
    torch.testing.assert_close(at_goal, at_two)
    still, at_goal, at_two = (matching_loss(each[None], source[None], **points) for each in (source, moved, twice))
    assert at_goal < 0.01 < at_two < 1 < still


@pytest.mark.parametrize("loss", [spatial, appearance])
def test_a_mask_restricts_the_loss_to_a_region(maps, loss):
    readout, other, extent = maps
    mask = torch.zeros(3, 1, *SIZE, dtype=torch.float64)
    mask[..., :2] = 1
    torch.testing.assert_close(loss(readout, other, extent, mask), loss(readout[..., :2], other[..., :2], extent))


@pytest.mark.parametrize("loss", [spatial, appearance])
def test_a_soft_mask_weighs_its_regions(maps, loss):
    readout, other, extent = maps
    mask = torch.full((3, 1, *SIZE), 0.25, dtype=torch.float64)
    mask[..., :2] = 0.75
    left, right = (loss(readout[..., half], other[..., half], extent) for half in (slice(0, 2), slice(2, 4)))
    torch.testing.assert_close(loss(readout, other, extent, mask), 0.75 * left + 0.25 * right)


@pytest.mark.parametrize("loss", [spatial, appearance])
def test_an_empty_mask_gives_no_loss_and_no_gradient(maps, loss):
    readout, other, extent = maps
    readout.requires_grad_()
    value = loss(readout, other, extent, torch.zeros(3, 1, *SIZE, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(value.sum(), readout)
    assert torch.equal(value, torch.zeros(3, dtype=torch.float64))
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("loss", [spatial, appearance, correspondence, matching])
def test_a_picture_s_loss_does_not_depend_on_the_others(maps, loss):
    readout, other, extent = maps
    alone = torch.cat([loss(readout[i : i + 1], other[i : i + 1], extent[i : i + 1]) for i in range(3)])
    assert alone.unique().numel() == 3
    torch.testing.assert_close(loss(readout, other, extent), alone)


@pytest.mark.parametrize("loss", [spatial, appearance, correspondence, matching])
def test_gradients_are_those_of_finite_differences(maps, loss):
    readout, other, extent = maps
    assert torch.autograd.gradcheck(lambda value: loss(value, other, extent), readout.requires_grad_())


def test_between_two_cells_a_point_reads_their_mean(maps):
    values = maps[0]
    across, down, amid = gather(values, torch.tensor([[2 / 4, 0.5 / 5], [0.5 / 4, 2 / 5], [1 / 4, 1 / 5]])).unbind(-1)
    torch.testing.assert_close(across, (values[..., 0, 1] + values[..., 0, 2]) / 2)
    torch.testing.assert_close(down, (values[..., 1, 0] + values[..., 2, 0]) / 2)
    torch.testing.assert_close(amid, values[..., :2, :2].mean((-2, -1)))


def test_points_on_the_border_read_the_outermost_cells(maps):
    values = maps[0]
    corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    assert torch.equal(gather(values, corners), values[..., [0, 0, -1, -1], [0, -1, 0, -1]])
