"""Scores on cases whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rg_engine.demo.render import edge_map
from rg_engine.demo.scores import auc, figure_extent, nearest_places, pck, peaks, sketch_iou


def test_a_peak_between_two_cells_is_found_between_them():
    maps = torch.zeros(1, 2, 8, 8)
    maps[0, 0, 3, 4] = maps[0, 0, 3, 5] = 1.0
    maps[0, 1, 7, 0] = 1.0
    torch.testing.assert_close(peaks(maps), torch.tensor([[[5 / 8, 3.5 / 8], [0.5 / 8, 7.5 / 8]]]))


def test_pck_counts_points_within_a_share_of_the_extent_and_leaves_padding_out():
    true = torch.zeros(2, 2, 2)
    found = torch.tensor([[[0.04, 0.0], [0.15, 0.0]], [[0.0, 0.09], [float("nan"), 0.0]]])
    assert pck(found, true, 1.0) == pytest.approx({"0.05": 1 / 3, "0.1": 2 / 3, "0.2": 1.0})
    assert pck(found, true, torch.tensor([0.5, 1.0]), at=[0.1])["0.1"] == pytest.approx(2 / 3)


def test_the_extent_of_a_figure_is_the_longer_side_of_its_box():
    assert figure_extent(torch.tensor([[[0.1, 0.2], [0.4, 0.9]]])).item() == pytest.approx(0.7)


def test_the_nearest_place_is_where_the_descriptor_went():
    source = torch.nn.functional.one_hot(torch.arange(16)).float().T.view(1, 16, 4, 4)
    moved = source.roll(1, dims=3)
    start = torch.tensor([[[0.375, 0.625]]])  # the middle of a cell, in the third row
    found = nearest_places(source, moved, start)
    assert (found - (start + torch.tensor([0.25, 0.0]))).abs().max() <= 0.125


def test_auc_is_one_for_scores_apart_a_half_for_equal_ones_and_none_when_turned_round():
    low, high = torch.tensor([0.1, 0.2]), torch.tensor([0.5, 0.9])
    assert auc(high, low) == 1.0
    assert auc(low, high) == 0.0
    assert auc(low, low) == 0.5


def test_a_picture_overlaps_with_its_own_edges_and_not_with_edges_elsewhere():
    picture = np.zeros((32, 32, 3), np.float32)
    picture[8:20, 8:20] = 1.0
    assert sketch_iou(picture, edge_map(picture)) == 1.0
    assert sketch_iou(picture, np.roll(edge_map(picture), 6, axis=1)) < 0.5
    assert sketch_iou(picture, np.zeros((32, 32), np.float32)) == 0.0
