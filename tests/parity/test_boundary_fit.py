"""Boundaries, moves and norms of BoundaryDiffusion's own code, through this extension's engine."""

from __future__ import annotations

import pytest
import torch
from boundary_kit import golden, relative, settings

from rg_engine.boundaries import Part, coordinate, mean_norm, shift_of, shifted
from rg_engine.boundaries.solvers import fisher, linear_svm, mean_difference


def training(space: str) -> tuple[torch.Tensor, torch.Tensor]:
    count = settings()["settings"]["n_train"]
    return golden()[f"inv.{space}"][:count].flatten(1), golden()["inv.labels"][:count] == 1


@pytest.mark.parametrize("space", ["z", "h"])
def test_the_svm_is_the_optimum_that_theirs_approaches(space):
    line = linear_svm(*training(space))
    assert relative(line.coef, golden()[f"fit.{space}.coef_tight"]) < 1e-4
    assert relative(line.coef, golden()[f"fit.{space}.coef"]) < 2e-3
    assert line.intercept == pytest.approx(float(golden()[f"fit.{space}.intercept_tight"]), rel=1e-4, abs=1e-6)
    normal = line.coef / line.coef.norm()
    assert float(normal @ golden()[f"fit.{space}.n"].double()) > 0.9999


@pytest.mark.parametrize("space", ["z", "h"])
def test_decisions_and_accuracy_on_test_pictures(space):
    count, facts = settings()["settings"]["n_train"], settings()["fit"][space]
    line = linear_svm(*training(space))
    features, labels = golden()[f"inv.{space}"][count:].flatten(1), golden()["inv.labels"][count:] == 1
    assert relative(line.decide(features), golden()[f"fit.{space}.test_decision"]) < 2e-3
    assert line.accuracy(features, labels) == facts["test_accuracy"]
    assert line.accuracy(*training(space)) == facts["train_accuracy"]


def test_classes_that_overlap():
    features, labels = golden()["toy.X"], golden()["toy.labels"] == 1
    line = linear_svm(features, labels)
    assert relative(line.coef, golden()["toy.coef_tight"]) < 1e-4
    assert line.intercept == pytest.approx(float(golden()["toy.intercept_tight"]), rel=1e-4, abs=1e-6)
    for other in (mean_difference, fisher):
        assert other(features, labels).accuracy(features, labels) > 0.7


@pytest.mark.parametrize("space", ["z", "h"])
def test_moves_to_their_distances(space):
    kit, distances = golden(), torch.tensor(settings()["d"], dtype=torch.float64)
    inverted = kit[f"edit.{space}_inverted"]
    part = Part(space=space, normal=kit[f"fit.{space}.n"].view(inverted.shape[1:]), middle=0.0, gap=1.0)
    rows = inverted.expand(len(distances), *inverted.shape[1:])
    moved = shifted(space, rows, part.normal, shift_of("distance", part, coordinate(part, rows), distances))
    assert relative(moved, kit[f"edit.{space}_start"]) < 1e-6
    torch.testing.assert_close(coordinate(part, moved), distances, atol=1e-3, rtol=1e-4)


def test_norms_of_inverted_pictures():
    assert mean_norm(golden()["inv.z"]) == pytest.approx(float(golden()["inv.up_norms"][:, -1].mean()), rel=1e-4)
