"""Moves reach every sampler by a change of variables: the sampler works in a frame of its own.

A sampler may keep its latent to itself, call the model on copies, several times a step, or remember predictions of steps
before. So nothing is written into its tensors. Where guidance has moved the latent by ``offset`` so far, the sampler's own
latent y stands for x = y + offset:

    its call model(y)  gives  model(y + offset) - offset
    its result y       means  y + offset

A sampler's step depends on differences only: moving its latent and all its predictions by the same amount moves its next
latent by that amount (d = (x - denoised) / sigma stays the same). Samplers therefore go on as if they had moved themselves,
whatever their order or the number of their calls, and what they remember stays comparable.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

#: What a function after cfg is given that lies in the latent's space.
LATENTS = ("denoised", "cond_denoised", "uncond_denoised", "input")
POST_CFG = "sampler_post_cfg_function"


class Frame:
    """The sampler's frame in one pass.

    shape: of the latent. others: functions after cfg that are not the sampler's own, and see what there is.
    """

    def __init__(self, shape: Sequence[int] = (), others: Sequence[Any] = ()) -> None:
        self._shape, self._others = tuple(shape), list(others)
        self.offset: Tensor | None = None  # (B, C, H, W)
        self.apart = 0  # calls of another shape: the sampler cuts its latent up itself

    def move(self, move: Tensor) -> None:
        """x has moved by so much."""
        self.offset = move if self.offset is None else self.offset + move

    def outside(self, y: Tensor) -> Tensor:
        """A latent or a prediction of the sampler's, as it is."""
        return y if self.offset is None else y + self.offset.to(y)

    def inside(self, x: Tensor) -> Tensor:
        """A latent or a prediction as the sampler has it."""
        return x if self.offset is None else x - self.offset.to(x)

    def call(self, model: Any, y: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        """The sampler's call of the model; what moves x meanwhile moves the frame."""
        if self._shape and tuple(y.shape) != self._shape:
            self.apart += 1
            return model(y, sigma, **kwargs)
        options = kwargs.get("model_options")
        own = [f for f in (options or {}).get(POST_CFG, ()) if f not in self._others]
        if options is not None and own:
            functions = [self._framed(f) if f in own else f for f in options[POST_CFG]]
            kwargs["model_options"] = {**options, POST_CFG: functions}
        return self.inside(model(self.outside(y), sigma, **kwargs))

    def _framed(self, function: Callable[[dict[str, Any]], Tensor]) -> Callable[[dict[str, Any]], Tensor]:
        """A sampler's own function after cfg, which notes predictions for its step (the samplers of CFG++)."""

        def framed(args: dict[str, Any]) -> Tensor:
            moved = {key: self.inside(args[key]) for key in LATENTS if isinstance(args.get(key), Tensor)}
            return self.outside(function({**args, **moved}))

        return framed if self.offset is not None else function


def framed(sampler: Any, frame: Callable[[], Frame | None]) -> Any:
    """A copy of a KSAMPLER that works in ``frame()``; samplers of other kinds as they are (see :class:`FramedModel`)."""
    function = getattr(sampler, "sampler_function", None)
    if function is None:
        return sampler

    @functools.wraps(function)
    def sample(model: Any, *args: Any, **kwargs: Any) -> Tensor:
        now = frame()
        if now is None:
            return function(model, *args, **kwargs)
        return now.outside(function(FramedModel(model, now), *args, **kwargs))

    shown = copy.copy(sampler)
    shown.sampler_function = sample
    return shown


class FramedModel:
    """The model as a sampler calls it, in a frame; everything else of it is the model's own."""

    def __init__(self, model: Any, frame: Frame) -> None:
        self._model, self._frame = model, frame

    def __call__(self, x: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        return self._frame.call(self._model, x, sigma, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)
