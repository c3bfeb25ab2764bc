"""ComfyUI's samplers by their gradient: which give the right one when each model call is run again.

Each name here is held against finite differences by tests/nodes/test_sampler_gradients.py.
"""

from __future__ import annotations

import inspect
from typing import Any

import comfy.k_diffusion.sampling
import comfy.model_sampling
import comfy.samplers

from ...errors import OptimizationError

RIGHT = (
    "euler", "euler_ancestral", "heun", "heunpp2", "dpm_2", "dpm_2_ancestral", "lms", "dpmpp_2s_ancestral", "dpmpp_sde",
    "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m_sde", "ddpm", "lcm", "ipndm", "gradient_estimation", "er_sde", "seeds_2",
    "seeds_3", "sa_solver", "ddim", "uni_pc", "uni_pc_bh2",
)  # fmt: skip
#: Those whose gradient would be wrong without a word, and why.
WRONG = {
    **dict.fromkeys(
        ("euler_ancestral_cfg_pp", "dpmpp_2s_ancestral_cfg_pp", "dpmpp_2m_cfg_pp"),
        "it takes the unconditional prediction out of the model behind the gradient's back",
    ),
    **dict.fromkeys(("ipndm_v", "deis"), "it cuts its earlier steps out of the gradient"),
}
#: What EDICT's coupled steps are.
COUPLED = ("euler", "ddim")


def check_sampler(name: str, coupled: bool) -> None:
    """Raises OptimizationError for a sampler that gives no gradient, or a wrong one."""
    if coupled and name not in COUPLED:
        raise OptimizationError(
            f"coupled latents (edict) take DDIM's steps and the sampler is {name!r}: set sampler_name to euler or ddim, or "
            "couple to none"
        )
    if name not in RIGHT:
        why = WRONG.get(name, "it is not known to give a gradient")
        raise OptimizationError(f"the sampler {name!r} can't be optimized through: {why}. Use one of {', '.join(RIGHT)}")


def differentiable(name: str, model_sampling: Any = None) -> Any:
    """ComfyUI's sampler of a name, whose function is not held under ``no_grad``.

    Ancestral samplers go on, for flow models, in a function of their own, which is: that one is taken at once.
    """
    sampler = comfy.samplers.sampler_object(name)
    function = sampler.sampler_function
    if isinstance(model_sampling, comfy.model_sampling.CONST):
        function = getattr(comfy.k_diffusion.sampling, f"sample_{name}_RF", function)
    sampler.sampler_function = inspect.unwrap(function)
    return sampler
