"""The two ways between a picture and its mixing step: up by DDIM inversion, down by sampling, inside ComfyUI's sampling.

Up, the paper's code takes eps at the lower level and the picture as it is for z at timestep 0. Steps are Euler's in x, which
are DDIM's in z: x = z sqrt(1 + sigma^2) for models on the VP schedule, x = z for flow models.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import comfy.model_management
import comfy.samplers
import torch
from comfy.k_diffusion import sampling as k_diffusion
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...errors import BoundaryError
from ..loaded.frozen_model import empty_prompt
from .hidden import Hidden
from .levels import as_noise, scale_at, sigmas_at

KEY = "readout_guidance_boundary"
GUIDANCE = "readout_guidance"  # the key of a guided model's wrappers: they have no business on the way up
Callback = Callable[[int, Tensor, Tensor, int], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompts:
    """What conditions every call. Raises BoundaryError for a cfg that needs a negative prompt and has none."""

    positive: Any = None
    negative: Any = None
    cfg: float = 1.0

    def __post_init__(self) -> None:
        if self.cfg != 1.0 and self.negative is None:
            raise BoundaryError(f"cfg is {self.cfg:g}, which needs a negative prompt: connect negative, or set cfg to 1")

    def of(self, pictures: Tensor, count: int) -> Prompts:
        """Those of some of ``count`` pictures, by their numbers, where the prompt has one row a picture."""
        return dataclasses.replace(
            self, positive=_rows(self.positive, pictures, count), negative=_rows(self.negative, pictures, count)
        )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class State:
    """Pictures at a timestep, on the CPU: z (B, C, h, w), the latent at the network's input scale; h of the call before."""

    timestep: int
    z: Tensor
    h: Tensor | None = None


def go_up(
    model: Any, samples: Tensor, timesteps: Sequence[int], prompts: Prompts, *, keep: Sequence[int], path: str | None = None,
    refinements: int = 0, callback: Callback | None = None,
) -> list[State]:  # fmt: skip
    """Invert pictures, latents (B, C, h, w), along rising timesteps; the states at those of ``keep``.

    path: where h is read. refinements: further calls a step, each of which brings the way down closer to exact.
    """
    hidden = None if path is None else Hidden(path)
    guider = _guider(unguided(model), prompts, hidden)
    sampling = model.get_model_object("model_sampling")
    sigmas = sigmas_at(sampling, timesteps)
    climb = _Climb(timesteps, set(keep), refinements, hidden, sampling)
    guider.sample(torch.zeros_like(samples), samples, climb, sigmas.flip(0), callback=callback, disable_pbar=True, seed=0)
    return climb.states


def go_down(
    model: Any, state: State, timesteps: Sequence[int], prompts: Prompts, *, eta: float = 0.0, noise: SharedNoise | None =
    None, hidden: Hidden | None = None, callback: Callback | None = None,
) -> tuple[Tensor, State]:  # fmt: skip
    """Sample from a state along falling timesteps (its own is the first), and on to the finished picture if they end at 0.

    eta: 0 is DDIM, 1 adds as much noise as DDPM does, from ``noise``. Returns the latent as a sampler gives it, and the
    state that it ended in.
    """
    guider = _guider(model, prompts, hidden)
    sampling = model.get_model_object("model_sampling")
    sigmas = sigmas_at(sampling, timesteps)
    if timesteps[-1] == 0:
        sigmas = torch.cat([sigmas, torch.zeros(1)])
    x = state.z / scale_at(sampling, float(sigmas[0]))
    ended: list[Tensor] = []

    def function(model_k: Any, x: Tensor, sigmas: Tensor, **options: Any) -> Tensor:
        if eta > 0:
            assert noise is not None
            options |= {"eta": eta, "noise_sampler": noise.draw}
            out = k_diffusion.sample_euler_ancestral(model_k, x, sigmas, **options)
        else:
            out = k_diffusion.sample_euler(model_k, x, sigmas, **options)
        ended.append(out)
        return out

    def each(step: int, denoised: Tensor, x: Tensor, total: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        if hidden is not None:
            hidden.next_step()
        if callback is not None:
            callback(step, denoised, x, total)

    samples = guider.sample(
        as_noise(sampling, x, sigmas), torch.zeros_like(x), comfy.samplers.KSAMPLER(function), sigmas, callback=each,
        disable_pbar=True, seed=noise.seed if noise is not None else 0,
    )  # fmt: skip
    z = ended[0].float().cpu() * (scale_at(sampling, float(sigmas[-1])) if timesteps[-1] else 1.0)
    h = None if hidden is None or hidden.seen is None else hidden.seen.float().cpu()
    return samples, State(timestep=timesteps[-1], z=z, h=h)


class SharedNoise:
    """Noise of a seed, the same for every version of a picture: (versions * pictures, C, h, w), version by version."""

    def __init__(self, seed: int, shape: Sequence[int], versions: int = 1) -> None:
        self.seed, self._shape, self._versions = seed, tuple(shape), versions
        self._generator = torch.Generator().manual_seed(seed)

    def draw(self, sigma: Any = None, sigma_next: Any = None) -> Tensor:
        one = torch.randn(self._shape, generator=self._generator).repeat(self._versions, *[1] * (len(self._shape) - 1))
        return one.to(sigma.device) if isinstance(sigma, Tensor) else one


class _Climb(comfy.samplers.Sampler):
    """A 'sampler' that goes up."""

    def __init__(
        self, timesteps: Sequence[int], keep: set[int], refinements: int, hidden: Hidden | None, sampling: Any
    ) -> None:
        self._timesteps, self._keep, self._refinements = list(timesteps), keep, refinements
        self._hidden, self._sampling = hidden, sampling
        self.states: list[State] = []

    def sample(
        self, model_wrap: Any, sigmas: Tensor, extra_args: dict, callback: Any, noise: Tensor, latent_image: Tensor,
        *_: Any, **__: Any,
    ) -> Tensor:  # fmt: skip
        denoised = latent_image

        def derivative(x: Tensor, sigma: Tensor) -> Tensor:
            nonlocal denoised
            comfy.model_management.throw_exception_if_processing_interrupted()
            denoised = model_wrap(x, sigma * x.new_ones([x.shape[0]]), **extra_args)
            return (x - denoised) / sigma

        rising = sigmas.flip(0)
        x = latent_image / scale_at(self._sampling, float(rising[0]))
        for i, (low, high) in enumerate(itertools.pairwise(rising)):
            found = x + (high - low) * derivative(x, low)
            for _repeat in range(self._refinements):
                found = x + (high - low) * derivative(found, high)
            x = found
            if self._timesteps[i + 1] in self._keep:
                self.states.append(self._state(self._timesteps[i + 1], x * scale_at(self._sampling, float(high))))
            if callback is not None:
                callback(i, denoised, x, len(rising) - 1)
        return x

    def _state(self, timestep: int, z: Tensor) -> State:
        seen = None if self._hidden is None else self._hidden.seen
        return State(timestep=timestep, z=z.float().cpu(), h=None if seen is None else seen.float().cpu())


def _guider(model: Any, prompts: Prompts, hidden: Hidden | None) -> comfy.samplers.CFGGuider:
    clone = model.clone()
    if hidden is not None:
        clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, hidden.apply_model)
    guider = comfy.samplers.CFGGuider(clone)
    guider.inner_set_conds({"positive": prompts.positive if prompts.positive is not None else empty_prompt(model)})
    if prompts.negative is not None:
        guider.inner_set_conds({"negative": prompts.negative})
    guider.set_cfg(prompts.cfg)
    return guider


def is_guided(model: Any) -> bool:
    return any(wrappers.get(GUIDANCE) for wrappers in model.wrappers.values())


def unguided(model: Any) -> Any:
    """A clone without readout guidance: pictures are inverted as they are."""
    clone = model.clone()
    for kind in list(clone.wrappers):
        clone.remove_wrappers_with_key(kind, GUIDANCE)
    clone.wrappers = {kind: wrappers for kind, wrappers in clone.wrappers.items() if wrappers}
    return clone


def _rows(conditioning: Any, pictures: Tensor, count: int) -> Any:
    if conditioning is None:
        return None
    picked = []
    for context, facts in conditioning:
        if len(context) not in (1, count):
            raise BoundaryError(
                f"the prompt has {len(context)} rows for {count} pictures: give one for all of them, or one each"
            )
        if len(context) == 1:
            picked.append([context, facts])
            continue
        several = {key: value for key, value in facts.items() if isinstance(value, Tensor) and len(value) == count}
        picked.append([context[pictures], {**facts, **{key: value[pictures] for key, value in several.items()}}])
    return picked
