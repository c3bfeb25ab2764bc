"""Boundaries: lines, spaces, moves, several at right angles, the choice of a step, labels, files."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import save_file

from rg_engine import boundaries as b
from rg_engine.boundaries import plot, solvers
from rg_engine.boundaries.boundary import check_mixing_step
from rg_engine.errors import BoundaryError


def refused(match):
    return pytest.raises(BoundaryError, match=match)


def part(normal, space="z", middle=0.0, gap=2.0):
    return b.Part(space=space, normal=torch.as_tensor(normal, dtype=torch.float32), middle=middle, gap=gap)


def made(*parts, **more):
    facts = {"mixing_step": 500, "steps": 12, "network": "a UNet", "latent_shape": (4, 8, 8), **more}
    return b.Boundary(parts=parts or (part(torch.ones(4, 8, 8)),), **facts)


def clouds(count=40, width=12, apart=4.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2 == 0
    features = torch.randn(count, width, generator=generator)
    features[labels, 0] += apart
    return features, labels


# Lines


def test_the_svm_of_two_points_lies_half_way():
    line = solvers.linear_svm(torch.tensor([[0.0, 1.0], [2.0, 1.0]]), torch.tensor([False, True]))
    torch.testing.assert_close(line.coef, torch.tensor([1.0, 0.0]).double())
    assert line.intercept == pytest.approx(-1.0)


def test_the_svm_keeps_its_margin_or_pays_for_it():
    """At the optimum no picture lies inside of the margin without its multiplier at C: the objective can't be bettered."""
    features, labels = clouds(apart=1.0)
    line = solvers.linear_svm(features, labels)

    def loss(coef, intercept):
        margins = (features.double() @ coef + intercept) * torch.where(labels, 1.0, -1.0)
        return float(coef.square().sum() / 2 + (1 - margins).clamp_min(0).sum())

    best, generator = loss(line.coef, line.intercept), torch.Generator().manual_seed(1)
    for size in (1e-3, 1e-2, 1e-1):
        nudge = torch.randn(len(line.coef), generator=generator).double() * size
        assert loss(line.coef + nudge, line.intercept) > best
        assert loss(line.coef, line.intercept + size) >= best
        assert loss(line.coef, line.intercept - size) >= best


@pytest.mark.parametrize("name", list(b.SOLVERS))
def test_every_solver_tells_clouds_apart_and_points_to_true(name):
    features, labels = clouds()
    line = b.SOLVERS[name](features, labels)
    unseen, theirs = clouds(seed=1)
    assert line.accuracy(unseen, theirs) > 0.9
    assert float(line.coef[0] / line.coef.norm()) > 0.5


def test_fisher_turns_away_from_directions_that_vary_within_the_classes():
    features, labels = clouds(count=200, width=2, apart=2.0)
    features[:, 1] = 5 * features[:, 1] + torch.where(labels, 2.0, 0.0)
    plain, turned = (solver(features, labels).coef for solver in (solvers.mean_difference, solvers.fisher))
    assert abs(turned[1] / turned[0]) < 0.3 * abs(plain[1] / plain[0])


def test_accuracy_without_pictures_kept_back_is_of_fits_that_left_some_out():
    generator = torch.Generator().manual_seed(0)
    nothing, labels = torch.randn(40, 200, generator=generator), torch.arange(40) % 2 == 0
    assert solvers.linear_svm(nothing, labels).accuracy(nothing, labels) == 1.0  # it can learn anything by heart
    assert solvers.cross_validated(nothing, labels, solvers.linear_svm) < 0.75
    assert solvers.cross_validated(*clouds(apart=8.0), solvers.linear_svm) > 0.95
    assert math.isnan(solvers.cross_validated(nothing[:3], labels[:3], solvers.linear_svm))


# Spaces and moves


def test_a_region_s_features_know_no_place():
    thing, latent = torch.tensor([3.0, -1.0]), torch.zeros(2, 2, 6, 6)
    masks = torch.zeros(2, 1, 6, 6)
    masks[0, 0, :2, :2] = masks[1, 0, 3:, 3:] = 1
    latent += masks * thing.view(1, 2, 1, 1)
    torch.testing.assert_close(b.features_of("region", latent, masks), thing.expand(2, 2))
    with refused("needs a mask"):
        b.features_of("region", latent)


def test_a_region_moves_inside_of_its_mask_only():
    mask = torch.zeros(1, 1, 6, 6)
    mask[..., 1:4, 2:5] = 1
    each, latent = part([0.6, 0.8], "region"), torch.randn(3, 2, 6, 6)
    moved = b.shifted("region", latent, each.normal, torch.tensor([1.0, 0.0, -2.0]), mask)
    assert torch.equal(moved * (1 - mask), latent * (1 - mask))
    gone = b.coordinate(each, moved, mask) - b.coordinate(each, latent, mask)
    torch.testing.assert_close(gone, torch.tensor([1.0, 0.0, -2.0]).double(), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("move", "strength", "ends"), [("by", 1.0, [4.0, 6.0]), ("by", 0.0, [0.0, 2.0]), ("to", 1.0, [5.0, 5.0]),
                                   ("to", -1.0, [1.0, 1.0]), ("distance", 7.0, [7.0, 7.0])],
)  # fmt: skip
def test_where_a_strength_leads(move, strength, ends):
    each, along = part([1.0, 0.0], middle=3.0, gap=4.0), torch.tensor([0.0, 2.0]).double()
    shift = b.shift_of(move, each, along, torch.full((2,), strength))
    torch.testing.assert_close(along + shift, torch.tensor(ends).double())


def test_a_boundary_reversed_undoes_it():
    each = part(torch.nn.functional.normalize(torch.randn(2, 3, 3).flatten(), dim=0).view(2, 3, 3), middle=1.0, gap=3.0)
    boundary, x = made(each, latent_shape=(2, 3, 3)), torch.randn(1, 2, 3, 3)
    there, back = boundary.parts[0], boundary.reversed().parts[0]
    for move in ("by", "to"):
        shift = b.shift_of(move, there, b.coordinate(there, x), torch.ones(1))
        far = b.shifted("z", x, there.normal, shift)
        again = b.shifted("z", far, back.normal, b.shift_of(move, back, b.coordinate(back, far), torch.ones(1)))
        if move == "by":
            torch.testing.assert_close(again, x)
        else:  # to the other class's mean, wherever it began
            assert float(b.coordinate(there, again)) == pytest.approx(1.0 - 1.5, abs=1e-5)


# Several


def test_later_boundaries_leave_earlier_ones_alone():
    generator = torch.Generator().manual_seed(0)
    parts = [part(torch.nn.functional.normalize(torch.randn(6, generator=generator), dim=0)) for _ in range(3)]
    directions = b.orthogonal_directions(parts)
    moves = torch.stack([each.per_unit for each in directions]) @ torch.stack([each.normal for each in parts]).T
    torch.testing.assert_close(moves.diagonal(), torch.ones(3))
    assert float(moves[1, 0].abs() + moves[2, :2].abs().sum()) < 1e-5
    assert directions[0].kept == 1.0
    assert all(0.2 < each.kept < 1.0 for each in directions[1:])


def test_the_same_boundary_again_adds_up_and_its_opposite_cancels():
    one = part([0.6, 0.8])
    first, again, undone = b.orthogonal_directions([one, one, part([-0.6, -0.8])])
    torch.testing.assert_close(again.per_unit, first.per_unit)
    torch.testing.assert_close(undone.per_unit, -first.per_unit)


def test_one_that_hardly_differs_is_refused():
    with refused("boundary 2 of the chain is nearly one of those before it in z: 10% of it"):
        b.orthogonal_directions([part([1.0, 0.0]), part([1.0, 0.1])])


# The step


def tried(step, flip=None, change=None):
    return b.Tried(step=step, accuracy={"z": 0.9}, norm=30.0, flip=flip, change=change)


def test_the_step_chosen_changes_least_among_those_that_flip():
    steps = [tried(200, 0.5, 0.1), tried(400, 0.96, 0.3), tried(500, 1.0, 0.35), tried(700, 1.0, 0.5)]
    assert b.best_of(steps).step == 400
    assert b.best_of([*steps[:1], tried(300, 1.0, 0.2), *steps[1:]]).step == 300  # 400 changes half as much again
    assert b.best_of([tried(300, 1.0, 0.28), *steps[1:]]).step == 400  # and here hardly more
    assert b.best_of([tried(200, 0.1, 0.3), tried(600, 0.0, 0.2)]).step == 600  # hardly any flip: that says nothing
    assert b.best_of([tried(200), tried(400), tried(700)]).step == 400  # nothing measured


@pytest.mark.parametrize("step", [-1, 0, 999, 2000])
def test_a_step_outside_of_the_schedule(step):
    with refused("lies outside the schedule"):
        check_mixing_step(step)
    with refused("lies outside the schedule"):
        made(mixing_step=step)


def test_the_plot_shows_what_was_measured():
    bare = plot.boundary_plot([tried(400)], 400)
    full = plot.boundary_plot([tried(400, 1.0, 0.3), tried(500, 0.5, 0.2)], 400)
    assert bare.shape == full.shape == (1, 400, 720, 3)
    green = (full - torch.tensor(plot.FLIP) / 255).abs().amax(-1) < 0.02
    assert int(green.sum()) > 50
    assert not bool(((bare - torch.tensor(plot.FLIP) / 255).abs().amax(-1) < 0.02).any())


# Examples


def test_labels_as_people_write_them():
    assert b.parse_labels("1, 0;yes no +", 5).tolist() == [True, False, True, False, True]
    with refused("label 'maybe' is neither"):
        b.parse_labels("1 maybe", 2)
    with refused("there are 3 labels for 2 pictures"):
        b.parse_labels("1 0 1", 2)


def test_pictures_kept_back_are_of_both_kinds_and_never_all():
    labels = torch.arange(30) % 3 == 0
    kept = b.held_out(labels, 0.2)
    assert int((kept & labels).sum()) == 2
    assert int((kept & ~labels).sum()) == 4
    assert not b.held_out(labels, 0.0).any()
    few = b.held_out(torch.tensor([True, False, False]), 0.5)
    assert few.tolist() in ([False, True, False], [False, False, True])
    rows = b.in_turn(kept, labels, 3)
    assert labels[rows].tolist() == [True, False, True]


def test_examples_that_teach_nothing():
    latents, labels = torch.randn(4, 2, 3, 3), torch.tensor([True, True, False, False])
    with refused("4 of 4 pictures have the attribute"):
        b.Examples(latents=latents, labels=torch.ones(4, dtype=torch.bool))
    with refused("0 of 4 pictures have the attribute"):
        b.Examples(latents=latents, labels=torch.zeros(4, dtype=torch.bool))
    with refused("all pictures are alike"):
        b.Examples(latents=latents[:1].expand(4, 2, 3, 3), labels=labels)
    with refused("not numbers"):
        b.Examples(latents=latents * float("nan"), labels=labels)
    with refused("a mask is empty"):
        b.Examples(latents=latents, labels=labels, masks=torch.zeros(4, 1, 3, 3))


def test_a_part_that_is_no_direction():
    with refused("not finite, or zero"):
        part([0.0, 0.0])
    with refused("not finite, or zero"):
        part([float("nan"), 1.0])


# Files


def test_a_file_keeps_everything(tmp_path):
    boundary = made(part(torch.randn(4, 8, 8), middle=0.25), part(torch.randn(16, 2, 2), "h", gap=0.1), pictures=7,
                    accuracy=0.9, prompt="abc", solver="fisher")  # fmt: skip
    b.save_boundary(boundary, tmp_path / "x.safetensors")
    again = b.load_boundary(tmp_path / "x.safetensors")
    for one, other in zip(boundary.parts, again.parts, strict=True):
        assert (one.space, one.middle, one.gap) == (other.space, other.middle, other.gap)
        assert torch.equal(one.normal, other.normal)
    for name in ("mixing_step", "steps", "network", "latent_shape", "solver", "pictures", "accuracy", "prompt", "space"):
        assert getattr(again, name) == getattr(boundary, name)


def damaged(tmp_path, change):
    path = tmp_path / "x.safetensors"
    b.save_boundary(made(), path)
    change(path)
    return path


def with_metadata(path, change):
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        facts = json.loads(file.metadata()["readout_boundary"])
        tensors = {"z.normal": file.get_tensor("z.normal")}
    change(facts, tensors)
    save_file(tensors, path, metadata={"readout_boundary": json.dumps(facts)})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:300]), "truncated"),
        (lambda path: save_file({"a": torch.ones(1)}, path), "is not a boundary: it holds a"),
        (lambda path: with_metadata(path, lambda facts, _: facts.update(format_version="9")), "boundary format 9"),
        (lambda path: with_metadata(path, lambda facts, _: facts.pop("parts")), "damaged metadata"),
        (lambda path: with_metadata(path, lambda facts, _: facts.update(surprise=1)), "damaged metadata"),
        (lambda path: with_metadata(path, lambda facts, _: facts.update(mixing_step=4000)), "outside the schedule"),
        (lambda path: with_metadata(path, lambda _, tensors: tensors["z.normal"].fill_(float("nan"))), "not finite"),
    ],
)  # fmt: skip
def test_damaged_files(tmp_path, change, words):
    with refused(words):
        b.load_boundary(damaged(tmp_path, change))


def test_a_file_that_can_hold_code_is_not_opened(tmp_path):
    torch.save({"normal": torch.ones(3)}, tmp_path / "x.pt")
    with refused("no .safetensors file"):
        b.load_boundary(tmp_path / "x.pt")
    (tmp_path / "x.safetensors").write_bytes((tmp_path / "x.pt").read_bytes())
    with refused("can't be read"):
        b.load_boundary(tmp_path / "x.safetensors")
    with refused("can't be read"):
        b.load_boundary(tmp_path / "nothing.safetensors")
