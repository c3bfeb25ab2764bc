"""Training rotations: the authors' trajectories, COFT's ball, draws, and what a break leaves."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from rg_engine.adapters.energy import hyperspherical_energy
from rg_engine.adapters.extract import extract
from rg_engine.adapters.learning import AdapterExamples, AdapterTraining, OftSettings, Turns
from rg_engine.adapters.learning.turns import turned_input
from rg_engine.adapters.limits import coft_bound
from rg_engine.adapters.orthogonal import cayley, from_triangle, largest_angle, orthogonality_error, triangle
from rg_engine.adapters.rotation import Rotation, turn
from rg_engine.errors import TrainingError
from rg_engine.training.loop import LoopSettings, Training

KIT = Path(os.environ.get("READOUT_GUIDANCE_OFT_KIT") or Path(__file__).parents[1] / "parity" / "data" / "oft")
RECORDED = load_file(KIT / "training" / "trajectory.safetensors")
FACTS = json.loads((KIT / "training" / "trajectory.json").read_text(encoding="utf-8"))
RUNS = {kind: [run for run in FACTS if FACTS[run]["optimiser"] == kind] for kind in ("adamw", "sgd")}


def layer_loss(turns: Turns) -> torch.Tensor:
    """The authors' layer alone: mean squared error of the turned layer on X against Y."""
    given = RECORDED
    (rotation,) = turns.in_force().values()
    return F.mse_loss(F.linear(turned_input(given["X"], rotation), given["W0"], given["bias"]), given["Y"])


def start(run: str) -> tuple[Turns, float]:
    facts = FACTS[run]
    rate, eps = facts["lr"], facts["eps"] if facts["coft"] else 0.0
    n, b = RECORDED[f"{run}.R"].shape[1:3]
    return Turns({"layer": (n, b)}, eps), rate


def theirs_of(turns: Turns) -> torch.Tensor:
    """R as the authors' files have it: W' = W blockdiag(Cayley(-R))^T."""
    return -turns.skews()["layer"].detach()


def check(run: str, losses: list[float], before: list[torch.Tensor], used: list[torch.Tensor], turns: Turns) -> None:
    recorded = RECORDED[f"{run}.R"]
    assert torch.allclose(torch.tensor(losses), RECORDED[f"{run}.loss"], rtol=1e-5)
    for step, r in enumerate(before):
        assert float((r - recorded[step + 1]).abs().max()) < 2e-6, step
    if f"{run}.R_used" in RECORDED:
        for step, r in enumerate(used[: len(RECORDED[f"{run}.R_used"])]):
            assert float((r - RECORDED[f"{run}.R_used"][step]).abs().max()) < 2e-6, step
    (layer,) = turns.layers()
    assert float((layer.rotation.turn(RECORDED["W0"]) - RECORDED[f"{run}.W"]).abs().max()) < 2e-6
    assert abs(hyperspherical_energy(layer.rotation.turn(RECORDED["W0"])) - hyperspherical_energy(RECORDED["W0"])) < 1e-8


@pytest.mark.parametrize("run", RUNS["adamw"])
def test_the_authors_trajectory_through_the_loop_of_every_training(run):
    turns, rate = start(run)
    steps = len(RECORDED[f"{run}.loss"])
    before, used = [], [theirs_of(turns)]

    def constrain(network):
        before.append(theirs_of(network))
        network.project()
        used.append(theirs_of(network))

    settings = LoopSettings(
        steps=steps, learning_rate=rate, warm_up=1, schedule="constant", weight_decay=FACTS[run]["weight_decay"], ema=0.0
    )
    training = Training(
        turns, lambda step: [()], lambda: layer_loss(turns)[None], settings, name="kit", facts={}, constrain=constrain
    )
    training.run()
    check(run, [loss for _, loss, _ in training.history], before, used, turns)


@pytest.mark.parametrize("run", RUNS["sgd"])
def test_the_authors_trajectory_with_sgd(run):
    """A triangle's gradient is twice theirs, so half the rate."""
    turns, rate = start(run)
    optimiser = torch.optim.SGD(turns.parameters(), lr=rate / 2)
    losses, before, used = [], [], [theirs_of(turns)]
    for _ in RECORDED[f"{run}.loss"]:
        optimiser.zero_grad()
        loss = layer_loss(turns)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
        before.append(theirs_of(turns))
        turns.project()
        used.append(theirs_of(turns))
    check(run, losses, before, used, turns)


@pytest.mark.parametrize("side", ["in", "out"])
def test_the_side_decides_which_energy_is_kept(side):
    generator = torch.Generator().manual_seed(0)
    weight, a = torch.randn(48, 32, generator=generator), torch.randn(4, 8, 8, generator=generator)
    n = (32 if side == "in" else 48) // 8
    rotation = Rotation(q=(a - a.mT)[:1].expand(n, -1, -1) * torch.arange(1, n + 1)[:, None, None], side=side)
    turned = rotation.turn(weight)
    kept, other = ("rows", "columns") if side == "in" else ("columns", "rows")
    assert abs(hyperspherical_energy(turned, kept) - hyperspherical_energy(weight, kept)) < 1e-7
    assert abs(hyperspherical_energy(turned, other) - hyperspherical_energy(weight, other)) > 1e-5


def test_strength_follows_the_tangent_of_half_the_angle():
    angle = math.radians(70)
    t = math.tan(angle / 2)
    rotation = Rotation(q=torch.tensor([[[0.0, -t], [t, 0.0]]]), side="in")
    for strength in (0.25, 1.0, 2.0, -1.0):
        expected = 2 * math.atan(strength * t)
        assert float(rotation.blocks(strength)[0, 0, 0]) == pytest.approx(math.cos(expected), abs=1e-6)
        assert orthogonality_error(rotation.blocks(strength)) < 1e-6


def test_a_way_there_and_back_is_nothing():
    a = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(1))
    rotation, weight = Rotation(q=a - a.mT, side="in"), torch.randn(6, 32)
    assert torch.allclose(rotation.turn(rotation.turn(weight, 0.7), -0.7), weight, atol=1e-5)


def test_turned_inputs_are_turned_weights():
    a, x, weight = torch.randn(4, 8, 8), torch.randn(5, 7, 32), torch.randn(6, 32)
    r = cayley(a - a.mT)
    wanted = F.linear(x, turn(weight, r, "in"))
    assert torch.allclose(F.linear(turned_input(x, r), weight), wanted, atol=1e-4)
    pictures = torch.randn(2, 32, 5, 5)
    wanted = F.conv2d(pictures, turn(weight[..., None, None], r, "in"))
    assert torch.allclose(F.conv2d(turned_input(pictures, r, True), weight[..., None, None]), wanted, atol=1e-4)


def test_triangles_and_skew_blocks():
    a = torch.randn(3, 5, 5)
    q = a - a.mT
    assert torch.equal(from_triangle(triangle(q), 5), q)


def test_coft_keeps_each_block_in_its_ball():
    turns = Turns({"layer": (4, 8)}, coft_eps=0.01)
    with torch.no_grad():
        turns.triangles[0].copy_(torch.randn(4, 28))
        turns.triangles[0][1] *= 1e-4
    inside = turns.triangles[0][1].clone()
    turns.project()
    norms = torch.linalg.matrix_norm(turns.skews()["layer"].detach())
    assert float(norms.max()) == pytest.approx(coft_bound(0.01, 4, 8), rel=1e-5)
    assert torch.equal(turns.triangles[0][1], inside)


@pytest.mark.parametrize(("n", "b"), [(1, 32), (4, 8)])
def test_a_rotation_is_found_again(n, b):
    generator = torch.Generator().manual_seed(2)
    weight, a = torch.randn(40, 32, generator=generator), torch.randn(n, b, b, generator=generator) * 0.2
    rotation = Rotation(q=a - a.mT, side="in")
    found = extract(weight, rotation.turn(weight), n, b)
    assert float((found.rotation.turn(weight) - rotation.turn(weight)).abs().max()) < 2e-6
    assert found.left / found.changed < 1e-10
    noisy = extract(weight, rotation.turn(weight) + 0.02 * torch.randn(40, 32, generator=generator), n, b)
    assert 1e-5 < noisy.left / noisy.changed < 0.05
    assert torch.allclose(noisy.rotation.turn(weight), rotation.turn(weight), atol=0.2)


def test_what_the_weights_leave_open_is_left_alone():
    """Fewer neurons than inputs: the rotation found is the nearest to none."""
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(3))
    assert float(extract(weight, weight + 1e-6, 1, 32).rotation.q.abs().max()) < 1e-4


def test_a_reflection_is_told():
    weight = torch.randn(40, 8, generator=torch.Generator().manual_seed(4))
    mirrored = weight.clone()
    mirrored[:, 0] *= -1
    found = extract(weight, mirrored, 1, 8)
    assert found.flipped == 1
    assert found.left > 0.01


def target_loss(turns, noisy, of_class):
    """A made-up model: each picture's mean is turned by the rotation."""
    (rotation,) = turns.in_force().values()
    x = noisy.latents.flatten(1)[:, :8] + 0.1 * noisy.noise.flatten(1)[:, :8]
    return (turned_input(x, rotation) - x.roll(1, -1)).square().mean(1) * (1 + noisy.time)


def training(examples=None, checkpoint=None, **settings) -> AdapterTraining:
    values = {"steps": 8, "batch": 2, "learning_rate": 0.05, "warm_up": 1, "validate_every": 0, "ema": 0.8, **settings}
    made = examples or AdapterExamples(latents=torch.randn(5, 4, 4, 4, generator=torch.Generator().manual_seed(5)))
    turns = Turns({"layer": (2, 4)}, values.get("coft_eps", 0.0))
    return AdapterTraining(turns, made, target_loss, OftSettings(**values), facts={}, checkpoint=checkpoint)


def q_of(adapter) -> torch.Tensor:
    return adapter.layers[0].rotation.q


class Stop(Exception):
    pass


def test_resumed_is_uninterrupted_to_the_bit(tmp_path):
    whole = training()
    wanted = whole.run()
    first = training(checkpoint=tmp_path / "c")

    def stop(progress):
        if progress.step == 5:
            first._training._save()
            raise Stop

    with pytest.raises(Stop):
        first.run(stop)
    second = training(checkpoint=tmp_path / "c")
    assert torch.equal(q_of(second.run()), q_of(wanted))
    assert second.history == whole.history


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    training(checkpoint=tmp_path / "c").run()
    with pytest.raises(TrainingError, match=r"belongs to another training.*learning_rate"):
        training(checkpoint=tmp_path / "c", learning_rate=0.01).run()


def test_microbatches_give_the_same(tmp_path):
    assert torch.allclose(q_of(training(batch=4).run()), q_of(training(batch=4, accumulate=2).run()), atol=1e-6)


def test_the_average_is_skew_and_in_the_ball():
    q = q_of(training(coft_eps=0.005, learning_rate=0.5).run())
    assert torch.equal(q, -q.mT)
    assert float(torch.linalg.matrix_norm(q).max()) <= coft_bound(0.005, 2, 4) * 1.0001


def test_the_best_on_what_was_kept_back_is_given():
    made = training(validation_share=0.4, validate_every=2, learning_rate=0.5, steps=10)
    made.run()
    checks = [check for _, _, check in made.history if check is not None]
    assert len(checks) == 5
    best = made.best()
    again = training(validation_share=0.4, validate_every=2, learning_rate=0.5, steps=10)
    turns = Turns({"layer": (2, 4)})
    with torch.no_grad():
        turns.triangles[0].copy_(triangle(q_of(best)))
        loss, _ = again._validate(turns)
    assert loss == pytest.approx(min(checks), rel=1e-6)


def test_class_pictures_count_by_their_weight():
    latents = torch.randn(5, 4, 4, 4, generator=torch.Generator().manual_seed(6))
    plain, with_class = AdapterExamples(latents=latents), AdapterExamples(latents=latents, class_latents=-latents)
    assert torch.equal(q_of(training(plain).run()), q_of(training(with_class, prior_weight=0.0).run()))
    assert not torch.allclose(q_of(training(plain).run()), q_of(training(with_class, prior_weight=1.0).run()), atol=1e-4)


def test_each_epoch_shows_every_picture_once():
    made = AdapterExamples(latents=torch.randn(6, 4, 4, 4))
    seen = [row for step in range(4) for row in made.draw(step, 3, range(6), seed=1).pictures.tolist()]
    assert sorted(seen[:6]) == sorted(seen[6:]) == list(range(6))
    assert seen[:6] != seen[6:]


def test_a_loss_that_is_not_finite_stops_it():
    made = training()
    made._loss = lambda turns, *_: turns.triangles[0].sum() * torch.full((2,), torch.nan)
    with pytest.raises(TrainingError, match="the loss of 'the adapter' is nan"):
        made.run()


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"layers": "everything"}, "layers is 'everything': expected one of"),
        ({"blocks": 0}, "blocks is 0"),
        ({"block_size": 1}, "turns nothing"),
        ({"coft_eps": -1.0}, "coft_eps is -1"),
        ({"batch": 3, "accumulate": 2}, "can't be divided"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
    ],
)
def test_settings_that_can_not_be(values, match):
    with pytest.raises(TrainingError, match=match):
        OftSettings(**values)


@pytest.mark.parametrize(("width", "wanted"), [(320, (4, 80)), (32, (4, 8)), (30, (5, 6)), (7, (1, 7)), (2, (1, 2))])
def test_the_nearest_division(width, wanted):
    assert OftSettings(blocks=4).divided(width) == wanted


@pytest.mark.parametrize(
    ("latents", "class_latents", "match"),
    [
        (torch.zeros(0, 4, 4, 4), None, "expected pictures"),
        (torch.full((2, 4, 4, 4), torch.nan), None, "NaN"),
        (torch.zeros(2, 4, 4, 4), torch.zeros(2, 4, 8, 8), "make both of one size"),
    ],
)
def test_pictures_that_can_not_be_learned_from(latents, class_latents, match):
    with pytest.raises(TrainingError, match=match):
        AdapterExamples(latents=latents, class_latents=class_latents)


def test_the_largest_angle_is_that_of_the_largest_singular_value():
    a = torch.randn(3, 6, 6, generator=torch.Generator().manual_seed(8))
    r = cayley((a - a.mT).double())
    angles = torch.linalg.eigvals(r).angle().abs()
    assert largest_angle(a - a.mT) == pytest.approx(math.degrees(float(angles.max())), rel=1e-5)
