"""Where a model call's rows lie in the pictures that are being made."""

from __future__ import annotations

import pytest
import torch

from rg_engine.guidance import Branch, Objective, SourceStep, Target, parts_of
from rg_engine.losses import correspondence_loss, matching_loss
from rg_engine.types import Drag

LATENT = torch.randn(3, 4, 12, 10, generator=torch.Generator().manual_seed(0))


def tile(top: int, left: int, height: int = 6, width: int = 5) -> torch.Tensor:
    rolled = LATENT.roll((-top, -left), (2, 3))
    return rolled[..., :height, :width]


def test_a_call_of_everything_is_one_part_for_each_prompt():
    parts = parts_of(torch.cat([LATENT, LATENT]), LATENT, 2)
    assert [part.chunk for part in parts] == [0, 1]
    assert all(part.whole for part in parts)
    assert [part.rows for part in parts] == [slice(0, 3), slice(3, 6)]


@pytest.mark.parametrize(("top", "left"), [(0, 0), (6, 5), (3, 2), (9, 7)])
def test_a_tile_is_found_also_over_the_edge(top, left):
    (part,) = parts_of(tile(top, left), LATENT)
    assert not part.whole
    assert torch.equal(part.of(LATENT), tile(top, left))


def test_tiles_in_one_call_are_told_apart_and_their_prompts_too():
    call = torch.cat([tile(0, 0), tile(0, 0), tile(6, 5), tile(6, 5)])  # two tiles, each with both prompts
    parts = parts_of(call, LATENT, 2)
    assert [(part.chunk, part.rows.tolist()) for part in parts] == [
        (0, [0, 1, 2]), (1, [3, 4, 5]), (0, [6, 7, 8]), (1, [9, 10, 11]),
    ]  # fmt: skip
    for part in parts:
        assert torch.equal(part.of(LATENT), call[part.rows])


def test_a_window_of_a_batch_is_found_in_any_order():
    (part,) = parts_of(LATENT[[2, 0]], LATENT)
    assert part.pictures.tolist() == [2, 0]
    assert torch.equal(part.of(LATENT), LATENT[[2, 0]])


def test_what_shows_no_part_is_none_and_a_changed_whole_is_the_whole():
    assert parts_of(torch.randn(1, 4, 6, 5), LATENT) is None
    assert parts_of(torch.randn(3, 4, 24, 20), LATENT) is None
    (part,) = parts_of(LATENT * 1.01, LATENT)
    assert part.whole


def test_parts_add_up_to_the_pictures():
    total = torch.zeros_like(LATENT)
    for top in (0, 6):
        for left in (0, 5):
            (part,) = parts_of(tile(top, left), LATENT)
            part.add_to(total, part.of(LATENT))
    assert torch.equal(total, LATENT)


@pytest.fixture
def objective(make_head):
    spatial_head, correspondence_head = make_head(), make_head("correspondence")
    mask = torch.zeros(1, 12, 10)
    mask[:, 2:9, 1:8] = 1
    drags = (Drag((0.2, 0.2), (0.7, 0.9)), Drag((0.55, 0.1), (0.55, 0.1)))
    drag = Target(head=correspondence_head, drags=drags)
    control = torch.rand(3, 12, 10, 3, generator=torch.Generator().manual_seed(1))
    return Objective(
        (drag, Target(head=spatial_head, image=control), Target(head=spatial_head, image=control, mask=mask)), (12, 10), 3,
        torch.device("cpu"), paper_drags=True,
    )  # fmt: skip


@pytest.mark.parametrize("target", [0, 1, 2], ids=["drag", "spatial", "spatial with a mask"])
def test_the_losses_of_tiles_add_up_to_the_loss_of_the_whole(objective, target, monkeypatch):
    """What a head reads in a tile is another thing; here a tile's readout is that of the picture."""
    readout = torch.randn(3, objective.targets[target].head.output_channels or 8, 12, 10)
    source = SourceStep(readouts={0: torch.randn(3, readout.shape[1], 12, 10)}, z_min=torch.zeros(3), z_max=torch.ones(3))
    branch = Branch(features=[], emb=torch.zeros(3, 1), z=torch.stack([torch.zeros(3, 1, 1), torch.ones(3, 1, 1)], -1))

    def loss(of, seen):
        monkeypatch.setattr(Objective, "_read", lambda self, *_: {target: seen})
        return of.loss(branch, (target,), source)[0]

    total = torch.zeros(3)
    for top in (0, 6):
        for left in (0, 5):
            (part,) = parts_of(tile(top, left), LATENT)
            total += loss(objective.part(part), part.of(readout))
    tolerance = 0.02 if target == 0 else 1e-5  # a point between two tiles is interpolated otherwise
    torch.testing.assert_close(total, loss(objective, readout), rtol=tolerance, atol=tolerance)


def test_a_drag_counts_where_its_points_are():
    readout, source = torch.randn(2, 1, 8, 6, 6).unbind(0)
    ends = {"starts": torch.tensor([[0.25, 0.25]]), "ends": torch.tensor([[0.75, 0.75]])}
    away = correspondence_loss(readout, source, **ends, window=(0.5, 0.0, 0.5, 0.5))
    assert away.item() == 0
    arrival = correspondence_loss(readout, source, **ends, window=(0.5, 0.5, 0.5, 0.5))
    assert -0.5 <= arrival.item() <= 0


def test_a_match_is_looked_for_where_its_points_are():
    source = torch.randn(1, 8, 6, 6)
    places = {"starts": torch.tensor([[0.25, 0.25]]), "ends": torch.tensor([[0.75, 0.75]])}

    def loss(readout, left, top):
        window = (left / 6, top / 6, 0.5, 0.5)
        return matching_loss(readout[..., top : top + 3, left : left + 3], source, **places, window=window)

    moved = source.roll((3, 3), (2, 3))
    assert loss(source, 3, 0).item() == 0  # neither point
    assert loss(moved, 3, 3) < loss(source, 3, 3)  # should be found here
    assert 0 < loss(moved, 0, 0) < loss(source, 0, 0)  # and no more here
