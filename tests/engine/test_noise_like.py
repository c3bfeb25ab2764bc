"""The update of the noise, and what keeps it noise."""

from __future__ import annotations

import pytest
import torch

from rg_engine.errors import OptimizationError
from rg_engine.optimization import LENGTH, Keeper, Updater, UpdateSettings, statistics
from rg_engine.optimization.edict import Levels, ddim, invert_pair, pair_of, sample_pair, undo_ddim


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rms(t):
    return t.flatten(-3).square().mean(-1).sqrt()


@pytest.mark.parametrize("keep", ["norm", "white"])
@pytest.mark.parametrize("size", [(16, 16), (12, 20), (9, 7)])
def test_noise_that_has_not_moved_is_not_changed(keep, size):
    z = noise(1, 2, 4, *size)
    torch.testing.assert_close(Keeper(z, keep)(z), z)


def test_keeping_the_norm():
    start = noise(1, 2, 4, 16, 16)
    kept = Keeper(start, "norm")(start * torch.tensor([2.0, 0.5])[None, :, None, None, None])
    torch.testing.assert_close(kept, start)


def test_keeping_it_white_takes_a_pattern_out():
    start = noise(1, 1, 4, 32, 32)
    pattern = torch.linspace(0, 6.28, 32, dtype=torch.float64).sin() * 1.5
    moved = start + pattern
    kept = {keep: Keeper(start, keep)(moved) for keep in ("none", "norm", "white")}
    found = {keep: statistics(z)["neighbours"] for keep, z in kept.items()}
    assert found["none"] > 0.3
    assert found["norm"] > 0.3
    assert abs(found["white"] - statistics(start)["neighbours"]) < 0.1
    torch.testing.assert_close(rms(kept["white"]), rms(start), rtol=1e-6, atol=0)


def test_statistics_of_white_noise():
    found = statistics(noise(4, 4, 64, 64))
    assert found["rms"] == pytest.approx(1.0, abs=0.02)
    assert abs(found["neighbours"]) < 0.02
    assert abs(found["kurtosis"]) < 0.1


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e6])
def test_a_fast_update_is_as_long_whatever_the_loss(scale):
    z, gradient = noise(1, 2, 4, 8, 8), noise(1, 2, 4, 8, 8, seed=1)
    moved = Updater(z.float(), UpdateSettings(strength=3.0, momentum=0.0, keep="none"))(z.float(), scale * gradient.float())
    torch.testing.assert_close(rms(moved - z.float()), torch.full((1, 2), 3 * LENGTH), rtol=1e-4, atol=0)
    moved = Updater(z, UpdateSettings(strength=3.0, momentum=0.0, keep="none"))(z, scale * gradient)
    torch.testing.assert_close(rms(moved - z), torch.full((1, 2), 3 * LENGTH, dtype=torch.float64))
    assert float(((moved - z) * gradient).sum()) < 0


def test_momentum_and_nesterov():
    z, gradient = noise(1, 1, 4, 8, 8), noise(1, 1, 4, 8, 8, seed=1)
    step = -LENGTH * (1 - 0.9**2) ** 0.5 * gradient / rms(gradient)[..., None, None, None]
    for nesterov, lengths in ((False, (1.0, 1.9)), (True, (1.9, 2.71))):
        updater, at = Updater(z, UpdateSettings(keep="none", nesterov=nesterov)), z
        for length in lengths:
            moved = updater(at, gradient)
            torch.testing.assert_close(moved - at, length * step)
            at = moved


def test_the_authors_rule_clips_and_ties():
    z, gradient = pair_of(noise(1, 4, 8, 8)), noise(2, 1, 4, 8, 8, seed=1)
    tied = Updater(z, UpdateSettings(mode="reference", clip=0.2, keep="none"))(z, gradient)
    torch.testing.assert_close(tied - z, (-0.5 * gradient.mean(0, keepdim=True)).clamp(-0.2, 0.2).expand_as(z))
    free = Updater(z, UpdateSettings(mode="reference", clip=0.0, tied=False, keep="none", loss_scale=3.0))(z, gradient)
    torch.testing.assert_close(free - z, -1.5 * gradient)


@pytest.mark.parametrize("mode", ["fast", "reference"])
def test_a_row_without_a_usable_gradient_stays_and_the_others_move(mode):
    z, gradient = noise(1, 3, 4, 8, 8), noise(1, 3, 4, 8, 8, seed=1)
    settings = UpdateSettings(mode=mode, noise=0.1)
    updater, alone = Updater(z, settings), Updater(z[:, 2:], settings)
    perturbation = noise(3, 4, 8, 8, seed=2)
    first, alone_first = updater(z, gradient, perturbation), alone(z[:, 2:], gradient[:, 2:], perturbation[2:])
    broken = gradient.clone()
    broken[:, 0, 0, 0, 0] = float("nan")
    broken[:, 1] = 0
    second = updater(first, broken, perturbation)
    assert torch.equal(second[:, 0], first[:, 0])
    assert torch.isfinite(second).all()
    torch.testing.assert_close(second[:, 2:], alone(alone_first, gradient[:, 2:], perturbation[2:]))


@pytest.mark.parametrize(
    "given",
    [{"strength": -1.0}, {"strength": float("nan")}, {"clip": -1.0}, {"noise": float("inf")}, {"momentum": 1.0}],
    ids=str,
)
def test_settings_out_of_range(given):
    with pytest.raises(OptimizationError, match=next(iter(given))):
        UpdateSettings(**given)


@pytest.mark.parametrize("flow", [False, True])
@pytest.mark.parametrize("steps", [4, 5])
def test_coupled_sampling_is_undone_exactly(flow, steps):
    """For any prediction, also where the last noise level is 0, in the VP scale and in flow's."""
    sigma = torch.linspace(1.0 if flow else 6.0, 0.0, steps + 1).tolist()
    levels = Levels(sigma=tuple(sigma), scale=tuple(1.0 if flow else 1 / (1 + s * s) ** 0.5 for s in sigma))

    def predict(z, i):
        return torch.tanh(z.roll(1, -1) + 0.3 * i)

    x, y = noise(1, 4, 8, 8), noise(1, 4, 8, 8, seed=1)
    back = invert_pair(*sample_pair(x, y, predict, levels), predict, levels)
    for found, wanted in zip(back, (x, y), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8)


def test_the_step_is_eulers_in_x():
    levels = Levels(sigma=(3.0, 2.0), scale=(1 / 10**0.5, 1 / 5**0.5))
    z, eps = noise(1, 4, 8, 8), noise(1, 4, 8, 8, seed=1)
    x = z / levels.scale[0] + (2.0 - 3.0) * eps
    torch.testing.assert_close(ddim(z, eps, levels, 0), x * levels.scale[1])
    torch.testing.assert_close(undo_ddim(ddim(z, eps, levels, 0), eps, levels, 0), z)
