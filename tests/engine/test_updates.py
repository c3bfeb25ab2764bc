"""How z moves, given a gradient."""

from __future__ import annotations

import math

import pytest
import torch

from rg_engine.guidance import ReferenceUpdate, norm_ratio_length, rms_step


def rms(x):
    return x.flatten(1).square().mean(1).sqrt()


@pytest.fixture
def gradients():
    """Three gradients for z (2, 4, 3, 3), the second picture's much smaller than the first's."""
    scales = torch.tensor([100.0, 1e-6])[:, None, None, None]
    return torch.randn(3, 2, 4, 3, 3, generator=torch.Generator().manual_seed(0)) * scales


def test_an_rms_step_is_as_long_as_told_in_every_picture_and_against_the_gradient(gradients):
    move = rms_step(gradients[0], 0.3)
    torch.testing.assert_close(rms(move), torch.tensor([0.3, 0.3]))
    cosines = torch.nn.functional.cosine_similarity(move.flatten(1), gradients[0].flatten(1))
    torch.testing.assert_close(cosines, torch.tensor([-1.0, -1.0]))


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_a_picture_whose_gradient_says_nothing_does_not_move_and_the_others_do(gradients, value):
    gradient = gradients[0]
    expected = rms_step(gradient, 0.3)
    if value:
        gradient[0, 1, 2, 0] = value
    else:
        gradient[0] = value
    move = rms_step(gradient, 0.3)
    assert torch.equal(move[0], torch.zeros_like(move[0]))
    assert torch.equal(move[1], expected[1])


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_an_rms_step_does_not_depend_on_the_gradients_scale(gradients, scale):
    gradient = gradients[0, :1] / gradients[0, :1].abs().max()
    torch.testing.assert_close(rms_step(gradient * scale, 0.3), rms_step(gradient, 0.3))


def test_a_path_of_rms_steps_goes_straight_to_the_minimum_of_a_quadratic():
    """The gradient of |z - goal|^2 / 2 points along one line: every step takes its length off the distance."""
    generator = torch.Generator().manual_seed(0)
    goal, z = torch.randn(2, 2, 4, 3, 3, generator=generator)
    start = rms(z - goal)
    for n in range(1, 11):
        z = z + rms_step(z - goal, 0.05)
        torch.testing.assert_close(rms(z - goal), start - n * 0.05)


def test_the_first_reference_update_is_a_sign_step_of_the_papers_learning_rate(gradients):
    z = torch.randn(2, 4, 3, 3)
    moved = ReferenceUpdate(z, strength=1.5).step(gradients[0])
    expected = -0.02 * 1.5 * gradients[0] / (gradients[0].abs() + 1e-8)
    torch.testing.assert_close(moved - z, expected, rtol=1e-4, atol=1e-6)


def test_reference_updates_are_adamw_s_by_its_formula(gradients):
    z = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    update, expected = ReferenceUpdate(z, strength=0.5), z.clone()
    mean, square = torch.zeros_like(z), torch.zeros_like(z)
    for n, gradient in enumerate(gradients.double(), 1):
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        expected -= 0.02 * 0.5 * (mean / (1 - 0.9**n)) / ((square / (1 - 0.999**n)).sqrt() + 1e-8)
        torch.testing.assert_close(update.step(gradient), expected)


def test_two_reference_updates_equal_torch_s_adamw_without_weight_decay(gradients):
    z = torch.randn(2, 4, 3, 3)
    theirs = z.clone().requires_grad_()
    optimiser, update = torch.optim.AdamW([theirs], lr=0.02, weight_decay=0.0), ReferenceUpdate(z, strength=1.0)
    for gradient in gradients[:2]:
        theirs.grad = gradient.clone()
        optimiser.step()
        moved = update.step(gradient)
    assert torch.equal(moved, theirs)


def test_a_reference_update_leaves_the_latent_that_it_was_given(gradients):
    z = torch.randn(2, 4, 3, 3)
    before = z.clone()
    assert not torch.equal(ReferenceUpdate(z, strength=1.0).step(gradients[0]), before)
    assert torch.equal(z, before)


def test_a_reference_update_does_not_move_where_the_gradient_is_not_finite(gradients):
    z, gradient = torch.zeros(2, 4, 3, 3), gradients[0]
    gradient[0, 0, 0] = torch.tensor([math.nan, math.inf, -math.inf])
    moved = ReferenceUpdate(z, strength=1.0).step(gradient)
    assert (moved == 0).nonzero().tolist() == [[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 2]]


def test_a_norm_ratio_move_is_the_paper_s_alpha_times_the_gradient(gradients):
    """Sketch-Guided Diffusion, eq. 5-6: alpha = |z_t - z_{t-1}| / |gradient| * beta, with beta 1.6."""
    z, next_z = torch.randn(2, 2, 4, 3, 3)
    length = norm_ratio_length(z, next_z, 0.5)
    assert length.shape == (2, 1, 1, 1)
    alpha = (z - next_z).flatten(1).norm(dim=1) / gradients[0].flatten(1).norm(dim=1) * 1.6 * 0.5
    torch.testing.assert_close(rms_step(gradients[0], length), -alpha[:, None, None, None] * gradients[0])


def test_a_norm_ratio_move_is_in_each_picture_s_own_proportion_and_0_where_the_sampler_stays():
    z, next_z = torch.randn(2, 3, 4, 3, 3)
    next_z[1] = z[1]
    next_z[2] = z[2] - 3 * (z[0] - next_z[0])
    lengths = norm_ratio_length(z, next_z, 1.0).flatten()
    assert lengths[1] == 0
    torch.testing.assert_close(lengths[2], 3 * lengths[0])
    torch.testing.assert_close(lengths[0], 1.6 * (z[0] - next_z[0]).square().mean().sqrt())


def test_a_norm_ratio_length_is_taken_in_fp32():
    z, next_z = torch.full((1, 4, 8, 8), 300.0).half(), torch.zeros(1, 4, 8, 8).half()
    assert norm_ratio_length(z, next_z, 1.0).item() == pytest.approx(1.6 * 300)  # its square is beyond fp16
