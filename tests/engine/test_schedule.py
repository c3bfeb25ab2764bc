"""Which steps are guided, by which targets, and how far."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from rg_engine.errors import TargetError
from rg_engine.guidance import GuidanceSettings, Keyframes, make_plan
from rg_engine.guidance.schedule import PAPER_SIGMA, PATH_PER_TIME, landing, percent_of

_BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
_ALPHA_BAR = torch.cumprod(1 - _BETAS, 0)
LOG_SIGMAS = (((1 - _ALPHA_BAR) / _ALPHA_BAR) ** 0.5).log()

REFERENCE = GuidanceSettings(mode="reference")


def sd(percent: float) -> float:
    """percent_to_sigma of Stable Diffusion, as ComfyUI has it."""
    if percent <= 0:
        return 999999999.9
    return sd_sigma((1 - percent) * 999) if percent < 1 else 0.0


def sd_sigma(timestep: float) -> float:
    low, share = math.floor(timestep), timestep % 1
    return float(torch.lerp(LOG_SIGMAS[low], LOG_SIGMAS[math.ceil(timestep)], share).exp())


def sd_steps(count: int, last: float = 0.0) -> list[float]:
    """ComfyUI's ``normal`` schedule: evenly spaced timesteps, then ``last``."""
    return [sd_sigma(999 * (1 - i / (count - 1))) for i in range(count)] + [last]


def flow(percent: float) -> float:
    return 1 - percent


def path(plan):
    return sum(step.length for step in plan.steps)


@pytest.mark.parametrize("percent_to_sigma", [sd, flow])
def test_percent_of_is_the_inverse_of_percent_to_sigma(percent_to_sigma):
    for percent in (0.01, 0.25, 0.5, 0.9, 0.999):
        assert percent_of(percent_to_sigma(percent), percent_to_sigma) == pytest.approx(percent, abs=1e-5)
    assert percent_of(sd_sigma(999) if percent_to_sigma is sd else 1.0, percent_to_sigma) == 0
    assert percent_of(0.0, percent_to_sigma) == 1


@pytest.mark.parametrize("percent_to_sigma", [sd, flow])
def test_a_range_holds_both_its_ends(percent_to_sigma):
    sigmas = [percent_to_sigma(p) for p in (0.1, 0.24, 0.25, 0.4, 0.5, 0.51, 1.0)]
    plan = make_plan([(0.25, 0.5)], sigmas, REFERENCE, percent_to_sigma)
    assert [step.step for step in plan.steps] == [2, 3, 4]
    assert [step.sigma for step in plan.steps] == sigmas[2:5]


def test_a_range_from_0_holds_the_first_step_and_one_to_1_the_last():
    plan = make_plan([(0.0, 1.0)], sd_steps(10), REFERENCE, sd)
    assert [step.step for step in plan.steps] == list(range(10))


def test_strength_0_guides_nowhere():
    assert make_plan([(0.0, 1.0)], sd_steps(10), GuidanceSettings(strength=0.0), sd).steps == ()


def test_a_run_that_starts_after_the_range_is_not_guided():
    sigmas = [sd(0.6), sd(0.8), 0.0]
    assert make_plan([(0.0, 0.5)], sigmas, GuidanceSettings(), sd).steps == ()


@pytest.mark.parametrize("interval", [0.05, 0.1])
@pytest.mark.parametrize("count", [8, 20, 50])
@pytest.mark.parametrize("ends", [(0.0, 0.5), (0.0, 1.0), (0.2, 0.6), (0.3, 0.5)])
def test_the_fast_path_is_as_long_whatever_the_number_of_steps(ends, count, interval):
    settings = GuidanceSettings(strength=0.7, interval=interval)
    wanted = 0.7 * PATH_PER_TIME * (ends[1] - ends[0])
    assert path(make_plan([ends], sd_steps(count), settings, sd)) == pytest.approx(wanted, rel=0.15)


def test_at_strength_1_the_fast_path_over_the_first_half_is_the_papers():
    """Its 50 sign steps of 0.02 in a hundred, each as long as it has become in z where its tenth of the time ends."""

    def scale(percent: float) -> float:
        return (1 + sd_sigma((1 - percent) * 999) ** 2) ** -0.5

    papers = sum(0.02 * scale(math.floor(i / 10 + 1) / 10) / scale(i / 100) for i in range(50))
    assert path(make_plan([(0.0, 0.5)], sd_steps(50), GuidanceSettings(), sd)) == pytest.approx(papers, rel=0.01)


@pytest.mark.parametrize("count", [5, 6, 7, 8, 10, 11, 12, 13, 14, 16, 20, 30, 60])
def test_about_as_many_moves_are_made_at_any_number_of_steps(count):
    plan = make_plan([(0.0, 0.5)], sd_steps(count), GuidanceSettings(), sd)
    assert 4 <= sum(step.moves for step in plan.steps) <= 6
    assert max(step.length / step.moves for step in plan.steps) <= 0.19 * PATH_PER_TIME


def test_a_move_is_measured_where_the_sampler_takes_it():
    for step in make_plan([(0.0, 1.0)], sd_steps(20), GuidanceSettings(interval=0.0), sd).steps:
        assert step.lands == sd_steps(20)[step.step + 1]


@pytest.mark.parametrize(
    ("sigma", "after", "lands"), [(14.6, 11.0, 14.6), (5.0, 3.0, 5.0), (4518.0, 38.0, 38.0), (40.0, 9.0, PAPER_SIGMA)]
)
def test_reference_mode_is_measured_where_the_papers_code_does_as_far_as_its_noise_goes(sigma, after, lands):
    assert landing("reference", sigma, after) == pytest.approx(lands)


def test_a_target_that_counts_for_nothing_then_guides_nothing_then():
    ranges, steps = [(0.0, 0.5), (0.0, 0.5)], sd_steps(20)
    plan = make_plan(ranges, steps, GuidanceSettings(), sd, lambda i, percent: i == 0 or percent >= 0.2)
    assert all((1 in step.active) == (step.percent >= 0.2) for step in plan.steps)
    silent = Keyframes(points=((0.0, (0.0,)), (0.3, (0.0,)), (0.4, (1.0,))))
    assert min(step.percent for step in make_plan(ranges, steps, GuidanceSettings(keyframes=silent), sd).steps) > 0.3


def test_fast_mode_guides_once_in_an_interval_and_reference_mode_at_every_step():
    fast = make_plan([(0.0, 0.5)], sd_steps(50), GuidanceSettings(interval=0.1), sd)
    times = [percent_of(step.sigma, sd) for step in fast.steps]
    assert len(times) == 5
    assert all(later - earlier > 0.099 for earlier, later in itertools.pairwise(times))
    reference = make_plan([(0.0, 0.5)], sd_steps(50), GuidanceSettings(interval=0.1, mode="reference"), sd)
    assert [step.step for step in reference.steps] == list(range(25))


@pytest.mark.parametrize("iterations", [2, 5])
def test_more_iterations_are_more_and_shorter_moves_of_a_path_as_long(iterations):
    settings = GuidanceSettings(interval=0.1, iterations=iterations)
    plan = make_plan([(0.0, 0.5)], sd_steps(100), settings, sd)
    assert len(plan.steps) == 5 * iterations
    assert path(plan) == pytest.approx(PATH_PER_TIME * 0.5, rel=0.05)


def test_a_fast_step_moves_in_proportion_to_the_time_until_the_next():
    sigmas = [flow(p) for p in (0.0, 0.1, 0.3, 0.4, 1.0)]
    plan = make_plan([(0.0, 0.5)], sigmas, GuidanceSettings(strength=2.0), flow)
    times = [step.length / (2.0 * PATH_PER_TIME) for step in plan.steps]
    assert times == pytest.approx([0.1, 0.2, 0.1, 0.1], abs=1e-5)


def test_a_run_that_ends_early_moves_only_until_its_end():
    plan = make_plan([(0.0, 1.0)], sd_steps(10, last=sd(0.95))[5:], GuidanceSettings(), sd)
    assert path(plan) == pytest.approx(PATH_PER_TIME * (0.95 - percent_of(sd_steps(10)[5], sd)), rel=1e-3)


def test_a_fast_step_that_would_not_move_is_not_guided():
    plan = make_plan([(0.0, 0.5)], sd_steps(21), GuidanceSettings(), sd)  # its middle step lies on the range's end
    assert min(step.length for step in plan.steps) > 1e-3


def test_each_step_names_the_targets_that_guide_in_it():
    sigmas = [flow(i / 10) for i in range(11)]
    plan = make_plan([(0.0, 0.35), (0.25, 0.55), (0.85, 0.95)], sigmas, GuidanceSettings(), flow)
    assert {step.step: step.active for step in plan.steps} == {
        0: (0,), 1: (0,), 2: (0,), 3: (0, 1), 4: (1,), 5: (1,), 9: (2,),
    }  # fmt: skip
    assert plan.at(3).active == (0, 1)
    assert plan.at(7) is None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"strength": -0.1}, "strength"),
        ({"strength": math.nan}, "strength"),
        ({"strength": math.inf}, "strength"),
        ({"mode": "slow"}, "mode 'slow'.*fast, reference"),
        ({"iterations": 0}, "iterations"),
        ({"feature_steps": 0}, "feature_steps"),
        ({"keep_negative": -1}, "keep_negative"),
        ({"interval": -0.1}, "interval"),
        ({"interval": 1.5}, "interval"),
    ],
)
def test_settings_out_of_range_are_refused(settings, words):
    with pytest.raises(TargetError, match=words):
        GuidanceSettings(**settings)
