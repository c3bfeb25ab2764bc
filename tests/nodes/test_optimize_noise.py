"""Optimize Noise: the authors' runs through the node, KSampler's picture where nothing moves, and what a run leaves."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from comfyui_host import engine, node
from doodl_kit import Kit, comfyui_model, relative
from optimized_runs import STOCHASTIC, StandInVAE, along, gradient_of
from small_models import patcher


@pytest.fixture(scope="module")
def weights(_started_comfyui):
    with torch.inference_mode():
        return comfyui_model()


@pytest.fixture
def small(comfyui, weights):
    """The kit's network as a MODEL with its stand-in VAE: optimize(...), plain(...) (KSampler), symmetry, fp (a digest)."""
    import nodes

    kit = Kit()
    small = SimpleNamespace(kit=kit, model=patcher(weights), vae=StandInVAE(kit.decode))
    small.positive, small.negative = [[kit("ctx.cond"), {}]], [[kit("ctx.uncond"), {}]]
    small.symmetry = node("RG_PictureLoss", kind="symmetry", weight=1.0)

    def settings(**given):
        return {
            "model": small.model, "seed": 5, "steps": 4, "cfg": 3.0, "sampler_name": "euler", "scheduler": "normal",
            "positive": small.positive, "negative": small.negative,
            "latent_image": {"samples": torch.zeros(1, 4, 16, 16)}, "denoise": 1.0, **given,
        }  # fmt: skip

    def optimize(**given):
        given = {"vae": small.vae, "loss": small.symmetry, "updates": 3, **given}
        names = ("latent", "noise", "history", "losses", "plot")
        return SimpleNamespace(**dict(zip(names, node("RG_OptimizeNoise", **settings(**given)), strict=True)))

    def plain(**given):
        return nodes.KSampler().sample(**settings(**given))[0]["samples"]

    small.optimize, small.plain = optimize, plain
    return small


@pytest.mark.parametrize(("run", "couple"), [("quiet", "edict"), ("ddim_quiet", "none")])
def test_the_authors_run_through_the_node(small, monkeypatch, run, couple):
    """On their noise levels, from their latent; the last picture is the best, as its loss falls throughout."""
    import comfy.sample
    import comfy.samplers

    kit, asked = small.kit, small.kit.run(run)
    sigmas, pairs = kit("edict.sigmas"), kit(f"{run}.pair")
    start = pairs[0][:1] * (1 + sigmas[0] ** 2).sqrt() / sigmas[0]
    monkeypatch.setattr(comfy.samplers, "calculate_sigmas", lambda *_: sigmas)
    monkeypatch.setattr(comfy.sample, "prepare_noise", lambda *_: start)
    monkeypatch.setattr(engine("optimization.edict").sample_pair, "__defaults__", (kit.p,))
    done = small.optimize(
        latent_image={"samples": torch.zeros_like(start)},
        cfg=kit.cfg, steps=len(sigmas) - 1, couple=couple, mode="reference", updates=len(pairs) - 1, noise=0.0,
        clip=asked.clip_grad_val, loss_scale=asked.grad_scale,
    )  # fmt: skip
    wanted = (kit(f"{run}.losses") / asked.grad_scale).mean(1)
    assert relative(torch.tensor(done.losses[: len(wanted)]), wanted) < 1e-3
    assert done.losses[-1] == min(done.losses)
    last = done.noise["samples"] * 0.18215 / (1 + sigmas[0] ** 2).sqrt()  # z
    assert (last - pairs[-1][:1]).norm() < 0.01 * (pairs[-1][:1] - pairs[0][:1]).norm()


@pytest.mark.parametrize("nothing", [{"updates": 0}, {"strength": 0.0}])
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"cfg": 1.0, "steps": 1},
        {"sampler_name": "euler_ancestral"},
        {"sampler_name": "dpmpp_2m_sde", "scheduler": "karras"},
        {"sampler_name": "uni_pc"},
        {"latent_image": {"samples": torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))}, "denoise": 0.6},
        {
            "latent_image": {"samples": torch.ones(1, 4, 16, 16), "noise_mask": torch.eye(16)[None]},
            "sampler_name": "ddim",
        },
    ],
    ids=lambda given: ",".join(map(str, given)),
)
def test_without_updates_the_picture_is_ksamplers_to_the_last_bit(small, given, nothing):
    assert torch.equal(small.optimize(**given, **nothing).latent["samples"], small.plain(**given))


@pytest.mark.parametrize("sampler", STOCHASTIC)
def test_all_noises_are_those_that_ksampler_draws(small, sampler):
    for scheduler, steps in (("karras", 5), ("sgm_uniform", 2)):
        given = {"sampler_name": sampler, "scheduler": scheduler, "steps": steps}
        assert torch.equal(small.optimize(**given, noises="all", updates=0).latent["samples"], small.plain(**given))


def test_all_noises_move_and_keep_their_power(small, monkeypatch, caplog):
    seen = []
    trajectory = engine("comfy_host.optimized.trajectory").Trajectory
    call = trajectory.__call__
    monkeypatch.setattr(trajectory, "__call__", lambda way, u: (seen.append(u.detach().clone()), call(way, u))[1])
    with caplog.at_level("INFO", logger="readout_guidance"):
        done = small.optimize(sampler_name="euler_ancestral", noises="all", noise_like="norm", strength=0.15, updates=4)
    assert min(done.losses) < 0.99 * done.losses[0]
    assert "all 4 noises were optimized, and the output noise is the first" in caplog.text
    first, last = seen[0].flatten(2), seen[-1].flatten(2)
    assert len(first) == 4  # the last of 4 steps draws none
    torch.testing.assert_close(first.norm(dim=-1), last.norm(dim=-1), rtol=1e-4, atol=0)
    assert ((first - last).norm(dim=-1) > 1e-3 * first.norm(dim=-1)).all()


MODES = [
    {}, {"mode": "reference", "loss_scale": 0.1}, {"noise_like": "norm"}, {"nesterov": True}, {"keep_norm": False},
    {"noise": 1e-3}, {"couple": "edict", "steps": 10, "cfg": 1.0},
]  # fmt: skip


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_the_loss_falls(small, mode):
    strength = 1.0 if "mode" in mode else 0.15  # a network of random weights takes shorter steps than a trained one
    done = small.optimize(updates=2 if "couple" in mode else 4, strength=strength, **mode)
    assert min(done.losses) < 0.99 * done.losses[0]
    assert len(done.losses) == (3 if "couple" in mode else 5)
    assert done.plot.shape == (1, 400, 720, 3)


def test_a_preset_takes_the_place_of_the_settings(small):
    done = small.optimize(preset="aesthetic editing", updates=3, steps=1, cfg=1.0)
    assert len(done.losses) == 25 + 1


def test_the_same_seed_gives_the_same_and_the_history_shows_the_way(small):
    first, second = (small.optimize(noise=1e-3, sampler_name="euler_ancestral") for _ in range(2))
    assert torch.equal(first.latent["samples"], second.latent["samples"])
    assert first.losses == second.losses
    assert first.history.shape == (4, 256, 256, 3)
    assert not torch.equal(first.history[0], first.history[-1])
    assert small.optimize(noise=1e-3, sampler_name="euler_ancestral", seed=6).losses != first.losses


def test_rows_of_a_batch_are_optimized_each_by_itself(small):
    latent = {"samples": torch.zeros(2, 4, 16, 16)}
    both = small.optimize(latent_image=latent)
    assert both.history.shape == (4, 256, 512, 3)
    second = small.optimize(latent_image={**latent, "samples": latent["samples"][1:], "batch_index": [1]})
    torch.testing.assert_close(both.latent["samples"][1:], second.latent["samples"], rtol=1e-3, atol=1e-2)


def test_the_noise_makes_the_best_picture_again(small):
    done = small.optimize()
    again = small.optimize(latent_image=done.noise, updates=0)
    torch.testing.assert_close(again.latent["samples"], done.latent["samples"], rtol=1e-4, atol=1e-3)
    assert again.losses[0] == pytest.approx(min(done.losses), rel=1e-3)
    further = small.optimize(latent_image=done.noise, updates=2)
    assert min(further.losses) < min(done.losses)
    guided = engine("comfy_host.guided.sampling").guided_ksampler(
        small.model, None, engine("guidance").GuidanceSettings(), seed=5, steps=4, cfg=3.0, sampler_name="euler",
        scheduler="normal", positive=small.positive, negative=small.negative, latent=done.noise, denoise=1.0,
    )  # fmt: skip
    torch.testing.assert_close(guided["samples"], done.latent["samples"], rtol=1e-4, atol=1e-3)


def test_the_noise_keeps_its_size(small):
    def rms(t):
        return float(t.square().mean().sqrt())

    start = small.optimize(updates=0).noise["samples"]
    kept, free = (small.optimize(strength=0.8, keep_norm=keep).noise["samples"] for keep in (True, False))
    assert rms(kept) == pytest.approx(rms(start), rel=1e-4)
    assert rms(free) != pytest.approx(rms(start), rel=1e-4)


def test_outside_of_a_noise_mask_the_picture_stays(small):
    latent = {"samples": torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))}
    mask = torch.zeros(1, 16, 16)
    mask[..., 8:] = 1.0
    done = small.optimize(strength=0.15, latent_image={**latent, "noise_mask": mask})
    torch.testing.assert_close(done.latent["samples"][..., :8], latent["samples"][..., :8], rtol=1e-4, atol=1e-4)
    assert min(done.losses) < done.losses[0]


def test_losses_chain_with_their_weights(small):
    picture = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(2))
    palette = node("RG_PictureLoss", kind="palette", weight=2.0, image=picture)
    both = node("RG_PictureLoss", kind="symmetry", weight=0.5, previous=palette)
    alone = [small.optimize(loss=loss, updates=0).losses[0] for loss in (palette, small.symmetry)]
    assert small.optimize(loss=both, updates=0).losses[0] == pytest.approx(alone[0] + 0.5 * alone[1], rel=1e-5)


def test_what_is_kept_does_not_grow_with_the_steps(small):
    """But for each model call's input, a latent."""
    count = engine("lab.cost.operations").count_kept_bytes
    most = {}

    def work(way, network):
        modules = [p for m in network._modules for p in m.parameters()]
        with count(*modules) as kept:
            gradient_of(way, lambda ends: ends.square().mean())
        return kept[0]

    for steps in (10, 30):
        most[steps] = along(small.model, small.positive, small.negative, work, steps=steps)
    assert most[30] < 1.05 * most[10]


def test_half_precision_keeps_the_gradient(comfyui):
    """A model that computes in bf16, and one in fp16, also where the loss is small."""
    import comfy.supported_models
    from doodl_kit import KIT, unet_config
    from safetensors.torch import load_file

    kit, gradients = Kit(), {}
    for dtype, scale in ((torch.float32, 1.0), (torch.bfloat16, 1.0), (torch.float16, 1.0), (torch.float16, 1e-5)):
        config = comfy.supported_models.SD15(unet_config())
        config.set_inference_dtype(dtype, None)
        model = config.get_model({}, "")
        model.diffusion_model.load_state_dict(load_file(KIT / "unet.safetensors"))
        model.diffusion_model.to(dtype)

        def work(way, _network, scale=scale):
            return gradient_of(way, lambda ends: scale * kit.images(ends[0]).square().mean())[1]

        prompts = [[[kit(name), {}]] for name in ("ctx.cond", "ctx.uncond")]
        gradients[dtype, scale] = along(patcher(model), *prompts, work, steps=6, cfg=3.0).flatten().double()
    wanted = gradients.pop((torch.float32, 1.0))
    for found in gradients.values():
        assert float(torch.cosine_similarity(found, wanted, dim=0)) > 0.99
