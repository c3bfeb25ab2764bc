"""The source pass: the unguided run of the same seed, whose readouts a drag or an appearance target is compared with.

Passes are kept between runs, by everything that determines them: the next drag on the same picture needs none.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from typing import Any

import torch
from torch import Tensor

from ...guidance import SourceStep
from ..loaded.kept import Fingerprint, Kept

MOST_PASSES = 4


@dataclasses.dataclass(kw_only=True)
class SourcePass:
    """steps: readouts by step and branch; latents: x where each guided step begins. On the CPU."""

    steps: dict[tuple[int, int], SourceStep] = dataclasses.field(default_factory=dict)
    latents: dict[int, Tensor] = dataclasses.field(default_factory=dict)

    def keep(self, key: tuple[int, int], step: SourceStep, dtype: torch.dtype) -> None:
        """Keep a step's readouts; in half precision where the model computes in half precision."""
        kept = torch.float16 if dtype in (torch.float16, torch.bfloat16) else torch.float32
        self.steps[key] = _moved(step, torch.device("cpu"), kept)

    def step(self, key: tuple[int, int], device: torch.device) -> SourceStep | None:
        """The readouts of (step, branch), or of the nearest step there is: samplers that choose their own steps
        (dpm_adaptive) choose others for the guided run."""
        step, branch = key
        known = [k for k in self.steps if k[1] == branch]
        return _moved(self.steps[min(known, key=lambda k: abs(k[0] - step))], device, None) if known else None


def fingerprint(guider: Any, sampler: Any, sampling: Any, guidance: Any) -> Fingerprint:
    """Of all that a source pass follows from.

    sampling: what the sampler is given (noise, latent, mask, sigmas, options, seed), guidance: what is read out and when.
    """
    patcher = guider.model_patcher
    function = getattr(sampler, "sampler_function", None)
    how: Any = sampler
    if function is not None:
        how = (_made_of(function), sampler.extra_options, sampler.inpaint_options)
    model = (guider.inner_model, str(patcher.patches_uuid), patcher.object_patches, patcher.injections)
    return Fingerprint(model, guider.conds, guider.cfg, how, sampling, guidance)


def _made_of(function: Any) -> Any:
    """What a sampler's function does, as far as it can be told: functions made alike in different runs count as one."""
    if isinstance(function, functools.partial):
        return _made_of(function.func), function.args, function.keywords
    if isinstance(function, types.FunctionType):
        cells = [cell.cell_contents for cell in function.__closure__ or ()]
        return function.__module__, function.__code__, function.__defaults__, function.__kwdefaults__, cells
    return function


class SourcePasses(Kept[SourcePass]):
    """The last few source passes, by fingerprint."""

    def __init__(self, most: int = MOST_PASSES) -> None:
        super().__init__(most)


def _moved(step: SourceStep, device: torch.device, dtype: torch.dtype | None) -> SourceStep:
    return SourceStep(
        readouts={i: readout.to(device, dtype or readout.dtype) for i, readout in step.readouts.items()},
        z_min=step.z_min.to(device), z_max=step.z_max.to(device),
    )  # fmt: skip
