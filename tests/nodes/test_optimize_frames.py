"""Optimize Noise on models whose latents of pictures are videos of one frame (Qwen-Image, Wan)."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch
from comfyui_host import engine, node
from optimized_runs import STOCHASTIC, along, gradient_of, slope_error
from small_transformers import is_there, prompt, transformer, zero_latent

pytestmark = pytest.mark.usefixtures("comfyui")
FRAMED = pytest.mark.parametrize("name", ["wan2.1", "qwen-image"])


@pytest.fixture
def made(name, monkeypatch):
    """A small model, and Wan's own VAE, small and with random weights: optimize(...), and KSampler's picture."""
    import comfy.ldm.wan.vae
    import comfy.sd

    import nodes

    if not is_there(name):
        pytest.skip("not in this ComfyUI")
    wan = comfy.ldm.wan.vae.WanVAE
    narrow = functools.partial(
        wan, dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, attn_scales=[], dropout=0.0,
        temperal_downsample=[False, True, True],
    )  # fmt: skip
    with torch.inference_mode():
        network = narrow()
        engine("lab.cost.models").randomise(network, seed=4, scale=0.5)
        monkeypatch.setattr(comfy.ldm.wan.vae, "WanVAE", lambda **_: narrow())  # older ones know one width alone
        vae = comfy.sd.VAE(sd=network.state_dict(), dtype=torch.float32)
    kit = SimpleNamespace(name=name, model=transformer(name), vae=vae, positive=prompt(name, 1), negative=prompt(name, 2))

    def settings(**given):
        return {
            "model": kit.model, "seed": 5, "steps": 3, "cfg": 2.0, "sampler_name": "euler", "scheduler": "simple",
            "positive": kit.positive, "negative": kit.negative, "latent_image": {"samples": zero_latent(name, 2)},
            "denoise": 1.0, **given,
        }  # fmt: skip

    def optimize(**given):
        loss = node("RG_PictureLoss", kind="symmetry", weight=1.0)
        return node("RG_OptimizeNoise", **settings(**{"vae": vae, "loss": loss, "updates": 2, "strength": 0.3, **given}))

    kit.optimize = optimize
    kit.plain = lambda **given: nodes.KSampler().sample(**settings(**given))[0]["samples"]
    return kit


@FRAMED
@pytest.mark.parametrize("given", [{}, {"sampler_name": "euler_ancestral", "noises": "all"}], ids=str)
def test_it_begins_as_ksampler_and_gets_better(made, given):
    plain = made.plain(**{key: value for key, value in given.items() if key != "noises"})
    assert torch.equal(made.optimize(**given, updates=0)[0]["samples"], plain)
    latent, noise, history, losses, _ = made.optimize(**given)
    assert latent["samples"].shape == noise["samples"].shape == (2, 16, 1, 12, 16)
    assert history.shape == (3, 96, 2 * 128, 3)
    assert min(losses) < 0.999 * losses[0]
    decoded = made.vae.decode(latent["samples"]).view(2, 96, 128, 3)
    for row, best in enumerate(decoded):  # the pictures on the way are what ComfyUI makes of the latents
        seen = history[:, :, 128 * row : 128 * (row + 1)]
        assert min(float((picture - best).abs().max()) for picture in seen) < 0.02


@pytest.mark.parametrize("name", ["wan2.1"])
def test_all_noises_are_those_that_ksampler_draws_for_a_flow_model(made):
    for sampler in STOCHASTIC:
        latent = made.optimize(sampler_name=sampler, noises="all", updates=0)[0]["samples"]
        assert torch.equal(latent, made.plain(sampler_name=sampler)), sampler


@FRAMED
@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral", "dpm_2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde"])
def test_the_gradient_is_that_of_finite_differences(made, sampler):
    def work(way, _network):
        where = torch.randn(2, 16, 1, 12, 16, generator=torch.Generator().manual_seed(9))

        def loss(ends):
            return (ends[0] * where).sum() / where.norm()

        _, gradient = gradient_of(way, loss)
        assert way.start.shape[1:] == (2, 16, 12, 16)
        return slope_error(lambda u: loss(way(u)), way.start, gradient, 0.03)

    settings = {"shape": tuple(zero_latent(made.name, 2).shape), "steps": 3, "scheduler": "simple", "sampler": sampler}
    noises = "first" if sampler == "euler" else "all"
    assert along(made.model, made.positive, made.negative, work, noises=noises, **settings) < 2e-3


@FRAMED
def test_a_readout_of_the_finished_picture(made):
    """Its gradient, through the noised picture that the head reads, and that an update follows."""
    finished = engine("comfy_host.optimized.measured.finished_readout").FinishedReadout
    loaded = engine("comfy_host.loaded.model")
    backbone = loaded.backbone_of(made.model)
    head = engine("training.new_head").new_head("spatial", backbone, name="random", output_channels=1, projection=64, seed=0)
    picture = torch.rand(1, 96, 128, 1, generator=torch.Generator().manual_seed(9))
    target = node("RG_ReadoutTarget", head=head, weight=1.0, start_percent=0.0, end_percent=1.0, image=picture)
    losses = made.optimize(loss=None, target=target, updates=3)[3]
    assert min(losses) < 0.999 * losses[0]

    def work(way, network):
        tapped = loaded.tapped_for(made.model, [head])
        noise = 0.1 * torch.ones(1, 16, 1, 12, 16)
        read = finished(network, made.model.model_options, engine("guidance").chain(target), tapped, noise)
        latent = torch.randn(1, 16, 1, 12, 16, generator=torch.Generator().manual_seed(3))
        leaf = latent.clone().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(read(leaf).sum(), leaf)
        return slope_error(lambda x: read(x).sum(), latent, gradient, 0.03)

    assert along(made.model, made.positive, made.negative, work, shape=(1, 16, 1, 12, 16), steps=3) < 5e-3
