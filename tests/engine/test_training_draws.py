"""What each step sees: which examples, how noisy, moved where."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from small_training import KINDS, examples, read, settings

from rg_engine.training import in_a_row
from rg_engine.training.data.draws import Draw, KeptFeatures, draw_step, draw_validation

GIVEN = examples("spatial", 10)


def rows_of(draw, given=GIVEN):
    """Which examples a draw holds."""
    return (draw.pictures[:, 0] // given.groups.shape[1]).tolist()


def same(a: Draw, b: Draw) -> bool:
    values = [[getattr(draw, field.name) for field in dataclasses.fields(Draw)] for draw in (a, b)]
    return all(
        torch.allclose(x, y, rtol=0, atol=0, equal_nan=True) if isinstance(x, torch.Tensor) else x == y
        for x, y in zip(*values, strict=True)
    )


@pytest.mark.parametrize("batch", [1, 3, 4, 5, 20])
def test_every_epoch_shows_every_example_once_in_another_order(batch):
    seen = [row for step in range(60 // batch) for row in rows_of(draw_step(GIVEN, settings(batch=batch), step))]
    epochs = [tuple(seen[i : i + 10]) for i in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(epochs)) == 6


@pytest.mark.parametrize("more", [{}, {"noise_draws": 3}, {"shift": 0.25}])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_s_draw_is_the_same_whenever_it_is_asked_for_and_follows_from_the_seed(kind, more):
    given, chosen = examples(kind), settings(**more)
    first = draw_step(given, chosen, 3)
    draw_step(given, chosen, 4)
    torch.rand(7)
    assert same(draw_step(given, chosen, 3), first)
    assert not same(draw_step(given, chosen, 4), first)
    assert not same(draw_step(given, settings(**more, seed=1), 3), first)


@pytest.mark.parametrize("kind", KINDS)
def test_a_draw_holds_the_pictures_and_what_is_true_about_them(kind):
    given = examples(kind)
    draw = draw_step(given, settings(), 0)
    rows = rows_of(draw, given)
    assert torch.equal(draw.pictures, given.groups[rows])
    assert torch.equal(draw.latents, given.latents[draw.pictures])
    assert draw.noise.shape == draw.latents.shape
    assert draw.keys is None
    assert draw.truth is None if given.truth is None else torch.equal(draw.truth, given.truth[rows])


def test_noise_is_normal_and_another_for_every_picture_and_step():
    given = examples("appearance", 64)
    first, second = (draw_step(given, settings(batch=64), step).noise.flatten(0, 1) for step in (0, 1))
    assert first.mean().item() == pytest.approx(0, abs=0.02)
    assert first.std().item() == pytest.approx(1, abs=0.02)
    each = torch.cat([first, second]).flatten(1)
    alike = torch.corrcoef(each) - torch.eye(len(each))
    assert alike.abs().max() < 0.5


@pytest.mark.parametrize("batch", [1, 4, 7])
def test_the_times_of_a_batch_are_one_in_each_part_of_the_diffusion_time(batch):
    times = torch.stack([draw_step(GIVEN, settings(batch=batch), step).time for step in range(40)])
    assert times.dtype == torch.float32
    assert (times.mul(batch).floor().sort().values == torch.arange(batch)).all()
    assert len(times.unique()) == times.numel()
    if batch > 1:  # not always the same example's
        assert len(times.argmin(1).unique()) == batch


def test_rows_of_a_draw_are_some_of_its_examples():
    draw = draw_step(examples("correspondence"), settings(noise_draws=2), 0)
    some = draw.rows(range(1, 3))
    assert torch.equal(some.latents, draw.latents[1:3])
    assert torch.equal(some.noise, draw.noise[1:3])
    assert torch.equal(some.time, draw.time[1:3])
    assert torch.equal(some.truth, draw.truth[1:3])
    assert torch.equal(some.pictures, draw.pictures[1:3])
    assert some.keys == draw.keys[1:3]


# Moved about


def places(count, kind, truth):
    """Pictures that say where they were: channels x and y, in cells."""
    y, x = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    latents = torch.stack([x, y]).expand(count, -1, -1, -1)
    return in_a_row(kind, latents, latents if truth is None else truth)


def moved_by(latents):
    """How many cells right and down pictures (..., 2, 8, 8) of :func:`places` were moved."""
    return torch.tensor([4.0, 4.0]) - latents[..., 4, 4]


def test_a_shift_moves_pictures_and_their_maps_alike_by_up_to_its_share():
    given, moves = places(8, "spatial", None), []
    for step in range(12):
        draw = draw_step(given, settings(batch=8, shift=0.25), step)
        assert torch.equal(draw.truth, draw.latents[:, 0])
        x, y = given.latents[0]
        for latent, (right, down) in zip(draw.latents[:, 0], moved_by(draw.latents[:, 0]), strict=True):
            assert torch.equal(latent[0], (x - right).clamp(0, 7))  # what comes in repeats the border
            assert torch.equal(latent[1], (y - down).clamp(0, 7))
            moves.append((right.item(), down.item()))
    assert {right for right, _ in moves} == {down for _, down in moves} == {-2, -1, 0, 1, 2}
    assert len(set(moves)) > 15


def test_tracks_follow_each_picture_s_own_shift_and_points_that_leave_become_padding():
    tracks = torch.rand(8, 20, 2, 2)
    tracks[:, 0] = torch.nan
    given, left = places(16, "correspondence", tracks), 0
    for step in range(4):
        draw = draw_step(given, settings(batch=8, shift=0.25), step)
        moves = moved_by(draw.latents)  # (8, 2, 2)
        assert (moves[:, 0] != moves[:, 1]).any()
        expected = tracks[rows_of(draw, given)] + moves[:, None] / 8
        outside = ((expected < 0) | (expected > 1)).flatten(2).any(2)
        left += outside.sum().item()
        expected[outside] = torch.nan
        torch.testing.assert_close(draw.truth, expected, equal_nan=True)
    assert left > 0


# Features that are kept


def test_with_noise_draws_an_example_comes_with_so_many_noises_one_in_each_part_of_the_time():
    chosen = settings(noise_draws=3)
    seen: dict[tuple, tuple] = {}
    for step in range(60):
        draw = draw_step(GIVEN, chosen, step)
        assert [row for row, _ in draw.keys] == rows_of(draw)
        for j, key in enumerate(draw.keys):
            time, noise = seen.setdefault(key, (draw.time[j], draw.noise[j]))
            assert torch.equal(draw.time[j], time)
            assert torch.equal(draw.noise[j], noise)
            assert int(time * 3) == key[1]
    assert sorted(seen) == [(row, number) for row in range(10) for number in range(3)]
    assert len({noise.sum().item() for _, noise in seen.values()}) == 30


@pytest.mark.parametrize("kind", ["spatial", "correspondence"])
def test_kept_features_are_read_once_for_each_key_and_are_the_fresh_ones_in_half_precision(kind):
    given, chosen, asked = examples(kind, 5), settings(batch=7, noise_draws=2, shift=0.2), []

    def reading(draw):
        asked.extend(draw.keys)
        return read(draw)

    kept = KeptFeatures(reading)
    for step in range(30):
        draw = draw_step(given, chosen, step)  # 7 of 5 examples: some key may come twice
        found, fresh = kept(draw), read(draw)
        for a, b in zip(found.features, fresh.features, strict=True):
            assert a.dtype == torch.float16
            assert torch.equal(a, b.half())
        assert torch.equal(found.emb, fresh.emb)
        assert torch.equal(found.noise_level, fresh.noise_level)
    assert sorted(asked) == [(row, number) for row in range(5) for number in range(2)]


def test_features_of_a_draw_without_keys_are_not_kept():
    calls = []
    kept, draw = KeptFeatures(lambda draw: calls.append(draw) or read(draw)), draw_step(GIVEN, settings(), 0)
    assert torch.equal(kept(draw).features[0], read(draw).features[0])
    kept(draw)
    assert calls == [draw, draw]


# Validation


@pytest.mark.parametrize("kind", KINDS)
def test_validation_draws_are_always_the_same_and_never_moved(kind):
    given, chosen = examples(kind), settings(shift=0.25, noise_draws=2)
    draw = draw_validation(given, chosen)
    torch.rand(3)
    assert same(draw, draw_validation(given, settings(steps=99, batch=2)))
    assert not same(draw, draw_validation(given, settings(seed=1)))
    assert torch.equal(draw.latents, given.latents[given.groups])
    assert draw.keys is None
    assert (draw.time.mul(12).floor().sort().values == torch.arange(12)).all()


def test_of_many_examples_some_are_validated_evenly_spread():
    assert rows_of(draw_validation(examples("spatial", 200), settings(), most=5)) == [0, 50, 100, 149, 199]
