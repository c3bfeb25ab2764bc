"""Helpers of tests of Optimize Noise: a sampling run whose trajectory a test can hold, and a stand-in for a VAE."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from comfyui_host import engine
from torch import Tensor, nn

#: ComfyUI's samplers that draw noise on their way, of those that are optimized through.
STOCHASTIC = (
    "euler_ancestral", "dpm_2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde", "ddpm", "lcm",
    "er_sde", "seeds_2", "seeds_3", "sa_solver",
)  # fmt: skip


def along(
    model: Any, positive: Any, negative: Any, work: Callable[[Any, Any], Any], *, cfg: float = 3.0, steps: int = 5,
    sampler: str = "euler", scheduler: str = "normal", seed: int = 1, latent: Tensor | None = None, graph: str = "full",
    mask: Tensor | None = None, coupled: bool = False, sigmas: Tensor | None = None, noise: Tensor | None = None,
    shape: tuple[int, ...] = (1, 4, 16, 16), denoise: float = 1.0, noises: str = "first",
) -> Any:  # fmt: skip
    """``work(trajectory, network)``'s result, inside of a sampling run of ComfyUI's."""
    import comfy.sample
    import comfy.samplers

    optimized = engine("comfy_host.optimized.trajectory")
    plain = engine("comfy_host.loaded.frozen_layers").plain

    class Run(comfy.samplers.Sampler):
        def sample(self, guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask=None, *_):
            with torch.inference_mode(False), torch.no_grad():
                guider.conds = plain(guider.conds)
                noise, latent_image, denoise_mask, sigmas = plain([noise, latent_image, denoise_mask, sigmas])
                network = engine("comfy_host.optimized.network").Network(
                    guider, extra_args["model_options"], graph, calls=2 * len(sigmas)
                )
                way = optimized.Trajectory(
                    network, sampler, sigmas, extra_args, noise, latent_image=latent_image, denoise_mask=denoise_mask,
                    coupled=coupled, noises=noises,
                )  # fmt: skip
                self.result = work(way, network)
            return noise

    latent = torch.zeros(shape) if latent is None else latent
    chosen = comfy.samplers.KSampler(model, steps, model.load_device, sampler, scheduler, denoise, model.model_options)
    noise = comfy.sample.prepare_noise(latent, seed) if noise is None else noise
    guider, run = comfy.samplers.CFGGuider(model), Run()
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    guider.sample(noise, latent, run, chosen.sigmas if sigmas is None else sigmas, denoise_mask=mask, seed=seed)
    return run.result


def gradient_of(way: Any, loss: Callable[[Tensor], Tensor], u: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The loss of what a trajectory ends in, and its gradient."""
    leaf = (way.start if u is None else u).detach().clone().requires_grad_()
    with torch.enable_grad():
        value = loss(way(leaf))
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def slope_error(value: Callable[[Tensor], Tensor], x: Tensor, gradient: Tensor, step: float) -> float:
    """How far the slope along the gradient is from central differences, as a part of it."""
    direction = gradient / gradient.norm()
    ends = [float(value(x + sign * step * direction).double()) for sign in (1, -1)]
    return abs((ends[0] - ends[1]) / (2 * step) - float(gradient.norm())) / float(gradient.norm())


class _Linear(nn.Module):
    def __init__(self, decode: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.decode = decode


class StandInVAE:
    """What is used of a comfy.sd.VAE; decode: latents (B, C, h, w) to pictures (B, 3, H, W) in -1..1."""

    latent_channels = 4

    def __init__(self, decode: Callable[[Tensor], Tensor]) -> None:
        import comfy.model_patcher

        self.device, self.vae_dtype = torch.device("cpu"), torch.float32
        self.first_stage_model = _Linear(decode)
        self.patcher = comfy.model_patcher.ModelPatcher(self.first_stage_model, self.device, self.device)

    def throw_exception_if_invalid(self) -> None:
        pass

    def process_output(self, images: Tensor) -> Tensor:
        return ((images + 1) / 2).clamp(0, 1)

    def memory_used_decode(self, shape: Any, dtype: Any) -> int:
        return 1
