"""Moves that are carried beside a sampler's latent do what moves of the latent itself would have done."""

from __future__ import annotations

import itertools

import pytest
import torch
from comfyui_host import engine

pytestmark = pytest.mark.usefixtures("comfyui")
SIGMAS = torch.tensor([14.6, 9.0, 5.0, 2.5, 1.2, 0.5, 0.2, 0.0])
ONE_STEP = ["euler", "heun", "dpm_2"]
WITH_MEMORY = ["dpmpp_2m", "lms", "ipndm", "ipndm_v", "deis", "res_multistep", "gradient_estimation", "heunpp2"]
RENEWING = ["euler_ancestral", "dpm_2_ancestral", "lcm", "ddpm", "dpmpp_2m_sde", "dpmpp_3m_sde", "dpmpp_sde"]
DATA = torch.randn(1, 4, 24, 24, generator=torch.Generator().manual_seed(1))
START = SIGMAS[0] * torch.randn(1, 4, 24, 24, generator=torch.Generator().manual_seed(2))


class Denoiser:
    """What the sampler calls: exact for data of variance 0.4 around DATA, which makes predictions depend on x; at each call
    ``at(number)`` may move."""

    def __init__(self, at=lambda number: None) -> None:
        self.inner_model = self
        self.model_patcher = self
        self.at, self.calls, self.seen = at, 0, []
        self.noise_scaling = None

    def get_model_object(self, name):
        import comfy.model_sampling

        return type("Sampling", (comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.EPS), {})()

    @property
    def model_sampling(self):
        return self.get_model_object("model_sampling")

    def __call__(self, x, sigma, **_):
        self.at(self.calls)
        self.calls += 1
        self.seen.append(x.clone())
        share = 0.4 / (0.4 + sigma.view(-1, 1, 1, 1) ** 2)
        return DATA + share * (x - DATA) * torch.tanh(DATA)


def run(name, start=START, frame=None, model=None):
    import comfy.samplers

    torch.manual_seed(0)
    sampler = comfy.samplers.ksampler(name)
    if frame is not None:
        sampler = engine("comfy_host.guided.frame").framed(sampler, lambda: frame, 0.0)
    extra = {"model_options": {"transformer_options": {}}, "seed": 0}
    return sampler.sampler_function(model or Denoiser(), start.clone(), SIGMAS, extra_args=extra, disable=True)


def moved_at(number, move, immediately=True):
    """A frame, and a model in which its ``number``-th call moves."""
    frame = engine("comfy_host.guided.frame").Frame(START.shape)

    def at(call):
        if call == number:
            frame.move(move) if immediately else frame.move_next(lambda sigma: move)

    return frame, Denoiser(at)


@pytest.mark.parametrize("name", ONE_STEP + WITH_MEMORY)
def test_a_sampler_that_starts_elsewhere(name):
    """A move before anything was predicted, beside the latent or of it: the same picture."""
    move = torch.randn(START.shape, generator=torch.Generator().manual_seed(3))
    frame = engine("comfy_host.guided.frame").Frame(START.shape)
    frame.move(move)
    torch.testing.assert_close(run(name, frame=frame), run(name, START + move), rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("name", RENEWING)
def test_a_sampler_that_renews_noise_forgets_as_much_of_a_move(name):
    move = 3 * torch.randn(START.shape, generator=torch.Generator().manual_seed(3))
    frame = engine("comfy_host.guided.frame").Frame(START.shape)
    frame.move(move)
    ours, theirs, still = run(name, frame=frame), run(name, START + move), run(name)
    nothing = 0.002 * theirs.numel() ** 0.5  # of a move that is all but forgotten, chance is left
    assert (ours - theirs).norm() <= 0.1 * (theirs - still).norm() + nothing


@pytest.mark.parametrize(
    ("name", "power"), [("euler", 1.0), ("heun", 1.0), ("dpmpp_2m", 1.0), ("euler_ancestral", 2.0), ("dpmpp_2m_sde", 2.0)]
)
def test_how_fast_moves_fade_is_seen(name, power):
    """sigma' / sigma of a move is left in a deterministic step, the square of it where an ancestral one renews the noise."""
    frame = engine("comfy_host.guided.frame").Frame(START.shape)
    assert frame.fading == 1.0
    frame.move(3 * torch.randn(START.shape, generator=torch.Generator().manual_seed(3)))
    run(name, frame=frame)
    assert frame.fading == pytest.approx(power, abs=0.15)


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m", "res_multistep"])
def test_a_move_later_on_is_one_of_the_latent(name):
    """As if the sampler's own latent were written to before its third call."""
    move = torch.randn(START.shape, generator=torch.Generator().manual_seed(3))
    frame = engine("comfy_host.guided.frame").Frame(START.shape)
    inner = Denoiser()

    class Moving:
        inner_model = inner

        def __getattr__(self, attribute):
            return getattr(inner, attribute)

        def __call__(self, x, sigma, **kwargs):
            if inner.calls == 2:
                x = x + move
                frame.move(move)
            return inner(x, sigma, **kwargs)

    class Writing(Moving):
        def __call__(self, x, sigma, **kwargs):
            if inner.calls == 2:
                x += move
            return inner(x, sigma, **kwargs)

    ours = run(name, frame=frame, model=Moving())
    inner = Denoiser()
    torch.testing.assert_close(ours, run(name, model=Writing()), rtol=1e-3, atol=2e-3)


def test_a_sampler_of_another_pack_that_keeps_its_latent_to_itself():
    """Two stages a step, in double precision, the model called on copies, what was written there thrown away."""
    import comfy.samplers

    def sample(model, x, sigmas, extra_args=None, **_):
        x = x.double()
        for high, low in itertools.pairwise(sigmas):
            first = model(x.clone(), high * x.new_ones(1), **extra_args)
            if low == 0:
                return first.float()
            middle = (high * low).sqrt()
            between = first + (x - first) * middle / high
            second = model(between.clone(), middle * x.new_ones(1), **extra_args)
            x = x + (between - second) / middle * (low - high)
        return x.float()

    def result(start, frame=None):
        sampler = comfy.samplers.KSAMPLER(sample)
        if frame is not None:
            sampler = engine("comfy_host.guided.frame").framed(sampler, lambda: frame, 0.0)
        return sampler.sampler_function(Denoiser(), start.clone(), SIGMAS, extra_args={})

    move = torch.randn(START.shape, generator=torch.Generator().manual_seed(3))
    frame = engine("comfy_host.guided.frame").Frame(START.shape)
    frame.move(move)
    torch.testing.assert_close(result(START, frame), result(START + move), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [*ONE_STEP, *WITH_MEMORY, *RENEWING])
def test_without_a_move_nothing_changes(name):
    assert torch.equal(run(name, frame=engine("comfy_host.guided.frame").Frame(START.shape)), run(name))


def test_the_predictions_are_the_models_own_and_a_move_to_come_arrives_at_the_next_call():
    move = torch.ones(START.shape)
    frame, model = moved_at(1, move, immediately=False)
    run("euler", frame=frame, model=model)
    plain = Denoiser()
    run("euler", model=plain)
    for ours, theirs in zip(model.seen[:2], plain.seen[:2], strict=True):
        assert torch.equal(ours, theirs)
    assert torch.allclose(model.seen[2] - plain.seen[2], move, atol=1e-4)


def test_a_result_that_still_has_noise_is_moved_too():
    import comfy.samplers

    frame = engine("comfy_host.guided.frame").Frame(START.shape)
    move = torch.ones(START.shape)
    frame.move(move)
    sampler = engine("comfy_host.guided.frame").framed(comfy.samplers.ksampler("euler"), lambda: frame, float(SIGMAS[3]))
    extra = {"model_options": {}, "seed": 0}
    ours = sampler.sampler_function(Denoiser(), START.clone(), SIGMAS[:4], extra_args=extra, disable=True)
    theirs = comfy.samplers.ksampler("euler").sampler_function(
        Denoiser(), START + move, SIGMAS[:4], extra_args=extra, disable=True
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
