"""The negative prompt's prediction, taken from the steps before at guided steps, which then run one prompt only."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import comfy.model_patcher
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from torch import Tensor

from ...guidance.pictures import spread

KEY = "readout_guidance_kept_prompt"


class KeptPrompt:
    """What the prompts' predictions D differed in at the latest step that ran both, in units of its noise level:

        d = (D_positive - D_negative) / sigma        D_negative = D_positive - sigma' d    at a guided step at sigma'

    d is the difference of the predicted noise (of a flow model: of the velocity), which hardly changes from step to step
    where the noise itself, renewed by ancestral samplers, does. Only guiders that run two prompts, on the whole latent in
    one call, are served so; others run as they would.

    Args: most, guided steps in a row that go without the negative prompt; shape of the latent (B, C, H, W).
    """

    def __init__(self, most: int, shape: Sequence[int]) -> None:
        self._most = most
        self._shape = tuple(shape)
        self._difference: Tensor | None = None
        self._spared = 0  # guided steps since both prompts ran

    def install(self, options: dict[str, Any], guided: bool) -> dict[str, Any]:
        """Model options for one prediction of the sampler: a guided one may be spared a prompt, others run and are noted."""
        options = comfy.model_patcher.create_model_options_clone(options)
        call = functools.partial(self._call, guided)
        add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, call, options, is_model_options=True)
        return options

    def _call(
        self, guided: bool, calculate: Any, model: Any, conds: list, x: Tensor, timestep: Tensor, *args: Any
    ) -> list[Tensor]:  # fmt: skip
        """The wrapper around calc_cond_batch."""
        if len(conds) != 2 or not all(conds) or tuple(x.shape) != self._shape:
            return calculate(model, conds, x, timestep, *args)
        sigma = spread(timestep, x)
        if guided and self._difference is not None and self._spared < self._most:
            self._spared += 1
            positive, _ = calculate(model, [conds[0], None], x, timestep, *args)
            return [positive, positive - sigma * self._difference]
        positive, negative = calculate(model, conds, x, timestep, *args)
        self._difference, self._spared = (positive - negative) / sigma, 0
        return [positive, negative]
