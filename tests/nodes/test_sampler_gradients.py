"""The gradient through ComfyUI's samplers, each held against central differences; those that are wrong are refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from comfyui_host import engine
from doodl_kit import Kit, comfyui_model, relative
from optimized_runs import STOCHASTIC, along, gradient_of, slope_error
from small_models import patcher

NEAR = 2e-3  # fp32, central differences


@pytest.fixture(scope="module")
def weights(_started_comfyui):
    with torch.inference_mode():
        return comfyui_model()


@pytest.fixture
def small(comfyui, weights):
    """The DOODL kit's small network, which has learned a little, so that its sampling is smooth; prompts."""
    kit = Kit()
    kit.model = patcher(weights)
    kit.prompts = [[kit("ctx.cond"), {}]], [[kit("ctx.uncond"), {}]]
    return kit


def off(small, *, shape=(1, 4, 16, 16), step=0.03, **settings) -> float:
    """The slope along the gradient against central differences."""

    def work(way, _network):
        where = torch.randn(shape, generator=torch.Generator().manual_seed(9))

        def loss(ends):
            return (ends * where).sum() / where.norm()

        value, gradient = gradient_of(way, loss)
        assert torch.isfinite(value)
        return slope_error(lambda u: loss(way(u)), way.start, gradient, step)

    return along(small.model, *small.prompts, work, shape=shape, **settings)


def offered() -> list[str]:
    return list(engine("comfy_host.optimized.samplers").RIGHT)


RIGHT = (
    "euler", "euler_ancestral", "heun", "heunpp2", "dpm_2", "dpm_2_ancestral", "lms", "dpmpp_2s_ancestral", "dpmpp_sde",
    "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m_sde", "ddpm", "lcm", "ipndm", "gradient_estimation", "er_sde", "seeds_2",
    "seeds_3", "sa_solver", "ddim", "uni_pc", "uni_pc_bh2",
)  # fmt: skip


@pytest.mark.parametrize("sampler", RIGHT)
def test_a_sampler_that_is_offered(small, sampler):
    assert sampler in offered()
    assert off(small, sampler=sampler) < NEAR


def test_those_that_draw_noise_are_known(comfyui):
    samplers, drawn = engine("comfy_host.optimized.samplers"), engine("comfy_host.optimized.drawn_noise")
    assert sorted(STOCHASTIC) == sorted(name for name in offered() if drawn.draws(samplers.differentiable(name)))


def test_all_that_are_offered_are_tested(comfyui):
    assert sorted(offered()) == sorted(RIGHT)


WRONG = ("euler_ancestral_cfg_pp", "dpmpp_2s_ancestral_cfg_pp", "dpmpp_2m_cfg_pp", "ipndm_v", "deis")


@pytest.mark.parametrize("sampler", WRONG)
def test_a_sampler_that_is_silently_wrong_is_so_and_is_refused(small, sampler):
    samplers, errors = engine("comfy_host.optimized.samplers"), engine("errors")
    assert sampler in samplers.WRONG
    assert off(small, sampler=sampler) > 10 * NEAR
    with pytest.raises(errors.OptimizationError, match=f"{sampler}.*can't be optimized through.*euler"):
        samplers.check_sampler(sampler, False)


def test_every_other_sampler_of_comfyui_is_refused_by_name(comfyui):
    import comfy.samplers

    samplers, errors = engine("comfy_host.optimized.samplers"), engine("errors")
    others = set(comfy.samplers.KSampler.SAMPLERS) - set(samplers.RIGHT)
    assert "dpm_adaptive" in others
    for name in others:
        with pytest.raises(errors.OptimizationError, match=name):
            samplers.check_sampler(name, False)
    with pytest.raises(errors.OptimizationError, match="set sampler_name to euler or ddim"):
        samplers.check_sampler("heun", True)


def test_coupled_latents(small):
    assert off(small, coupled=True, steps=10, step=0.01) < NEAR


@pytest.mark.parametrize("graph", ["full", "light"])
def test_either_graph(small, graph):
    assert off(small, graph=graph) < NEAR


@pytest.mark.parametrize("sampler", STOCHASTIC)
def test_all_noises_of_a_stochastic_sampler(small, sampler):
    assert off(small, sampler=sampler, noises="all") < NEAR


def test_a_batch_without_cfg(small):
    assert off(small, shape=(2, 4, 16, 16), cfg=1.0) < NEAR


def test_inside_a_noise_mask_and_from_a_picture(small):
    latent = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 4:12] = 1.0
    assert off(small, latent=latent, mask=mask, denoise=0.7) < NEAR


def test_two_prompts_one_of_them_regional(small):
    area = torch.zeros(1, 16, 16)
    area[..., :8] = 1.0
    positive = [*small.prompts[0], [small.prompts[1][0][0], {"mask": area, "mask_strength": 0.7}]]
    small.prompts = positive, small.prompts[1]
    assert off(small) < NEAR


def test_a_controlnet(small):
    """It sees the latent too, so that the gradient goes through it as well."""
    import comfy.cldm.cldm
    import comfy.controlnet
    import comfy.ops
    from doodl_kit import unet_config

    config = {key: value for key, value in unet_config().items() if key not in ("out_channels", "transformer_depth_output")}
    net = comfy.cldm.cldm.ControlNet(hint_channels=3, operations=comfy.ops.disable_weight_init, device="cpu", **config)
    engine("lab.cost.models").randomise(net, seed=2, scale=0.7)
    control = comfy.controlnet.ControlNet(net, load_device=small.model.load_device, manual_cast_dtype=None)
    hint = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(3))
    control.set_cond_hint(hint, 0.3, (0.0, 1.0))
    small.prompts = [[small.prompts[0][0][0], {"control": control, "control_apply_to_uncond": True}]], small.prompts[1]
    assert off(small) < NEAR


def test_the_authors_gradient_through_comfyuis_own_euler(small):
    """Sampling as the kit's plain DDIM; the end's z in the VP scale, as its losses take it."""
    sigmas = small("edict.sigmas")
    z, last = small("x_T"), float(sigmas[-1])
    noise = z * (1 + sigmas[0] ** 2).sqrt() / sigmas[0]
    seen = {"latent": lambda z: z, "pixels": lambda z: (small.images(z) / 2 + 0.5).clamp(0, 1)}

    def work(way, _network):
        torch.testing.assert_close(way.start[0], z, rtol=1e-5, atol=1e-6)
        found = {}
        for name, function in seen.items():
            wanted = function(small("target.latent"))
            found[name] = gradient_of(way, lambda ends: (function(ends[0] / (1 + last**2) ** 0.5) - wanted).square().mean())  # noqa: B023
        return found

    found = along(small.model, *small.prompts, work, cfg=small.cfg, sigmas=sigmas, noise=noise, shape=z.shape)
    for name, (loss, gradient) in found.items():
        assert relative(loss, small(f"ddim.{name}.loss")) < 1e-4
        assert relative(gradient[0], small(f"ddim.{name}.dz")) < 1e-4


def test_a_flow_model_with_a_transformer(comfyui):
    """Its first latent, its noise and the network's input are on another scale."""
    transformer = engine("comfy_host.demo_model.transformer")
    with torch.inference_mode():
        model = transformer.new_transformer()
        engine("lab.cost.models").randomise(model.diffusion_model, seed=1, scale=0.5)
    facts = {"attention_mask": torch.ones(1, 16, dtype=torch.long)}
    prompts = [[[torch.randn(1, 16, 96, generator=torch.Generator().manual_seed(k)), facts]] for k in range(2)]
    kit = SimpleNamespace(model=patcher(model), prompts=prompts)
    for settings in ({"cfg": 1.0}, {"graph": "light"}, {"coupled": True}):
        assert off(kit, shape=(1, 8, 16, 16), steps=4, **settings) < NEAR


def test_a_lora(small):
    """Patches of weights, as LoRAs are, count in the gradient."""
    plain = small.model.model.diffusion_model.state_dict()["input_blocks.1.1.proj_in.weight"]
    small.model = small.model.clone()
    patch = ("diff", (torch.randn(plain.shape, generator=torch.Generator().manual_seed(5)) * 0.05,))
    small.model.add_patches({"diffusion_model.input_blocks.1.1.proj_in.weight": patch}, 1.0)
    assert off(small) < NEAR
