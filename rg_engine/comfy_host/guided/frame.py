"""Moves reach every sampler: they are carried beside its latent, which stays the sampler's own.

A sampler may keep its latent to itself, call the model on copies, several times a step, or remember predictions of steps
before. So nothing is written into its tensors, and its predictions are the model's own. The model sees x = y + offset, where
y is the sampler's latent and the offset what y would have if the sampler had moved along: every sampler's next latent is

    y' = a y + a_1 y_1 + ... + b D + b_1 D_1 + ... + noise      of the latest latents y, y_1 and predictions D, D_1

so the offsets of those latents become a offset + a_1 offset_1 + ... (In a deterministic step it is sigma' / sigma times the
latest one, less where noise is renewed.) How much of each is in it is seen from y' itself, by least squares: no sampler has
to be known by name.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

#: Samplers remember at most so many predictions, and go back to at most so many latents.
PREDICTIONS, LATENTS = 5, 3
#: What is left of y' beside the latest latent, as a part of it, if it is a matter of rounding.
ROUNDING = 1e-3
#: Earlier latents explain much where they leave less than this part of it.
MUCH = 0.9


class Frame:
    """The offset in one pass of a sampler. shape: of its latent."""

    def __init__(self, shape: Sequence[int] = ()) -> None:
        self._shape = tuple(shape)
        self._offset: Tensor | None = None  # x - y, (B, C, H, W)
        self._coming: Callable[[Tensor], Tensor] | None = None  # the next call's move, by its sigma
        #: y and its offset at the latest calls, the last one's first.
        self._latents: deque[tuple[Tensor, Tensor | None]] = deque(maxlen=LATENTS)
        self._sigma: Tensor | None = None  # of the latest call
        self._predictions: deque[Tensor] = deque(maxlen=PREDICTIONS)
        self._fallen: list[Tensor] = []  # from call to call, the logarithms (2,) of what is left of the offset, and of sigma
        self.apart = 0  # calls of another shape: the sampler cuts its latent up itself

    @property
    def fading(self) -> float:
        """The power of the noise level by which offsets fall: 1 where no noise is renewed, 2 where all that is renewed is
        once a step (ancestral samplers), more where a sampler renews it at calls in between. 1 if there was none."""
        left, sigma = torch.stack(self._fallen).sum(0).tolist() if self._fallen else (0.0, 0.0)
        return left / sigma if sigma else 1.0

    def move(self, move: Tensor) -> None:
        """x has moved by so much; the prediction that follows is made there."""
        self._offset = move if self._offset is None else self._offset + move

    def move_next(self, move: Callable[[Tensor], Tensor]) -> None:
        """x moves by ``move(sigma)`` where the sampler goes from here, at whatever sigma that is."""
        self._coming = move

    def of(self, y: Tensor) -> Tensor:
        """x, for the sampler's latent at the latest call."""
        return y if self._offset is None else y + self._offset.to(y)

    def call(self, model: Any, y: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        """The sampler's call of the model."""
        if self._shape and tuple(y.shape) != self._shape:
            self.apart += 1
            return model(y, sigma, **kwargs)
        denoised = model(self._arrived(y, sigma), sigma, **kwargs)
        self._latents.appendleft((y.clone(), self._offset))
        self._sigma = sigma
        self._predictions.appendleft(denoised.clone())
        return denoised

    def end(self, y: Tensor, sigma: float) -> Tensor:
        """The sampler's result at the schedule's last sigma, moved."""
        return y if sigma == 0 else self._arrived(y, y.new_full((len(y),), sigma))

    def _arrived(self, y: Tensor, sigma: Tensor) -> Tensor:
        if self._offset is not None and self._sigma is not None:
            most = max(1.0, float((sigma / self._sigma).max()))  # a call may look ahead, and the next one come back
            latents, offsets = zip(*self._latents, strict=True)
            shares = shares_of(latents, self._predictions, y, most)
            parts = [share * offset for share, offset in zip(shares, offsets, strict=False) if offset is not None]
            before, self._offset = self._offset, torch.stack(parts).sum(0) if parts else None
            if self._offset is not None:
                ratio = (sigma / self._sigma).amax().to(self._offset)
                fallen = torch.stack([self._offset.norm() / before.norm(), ratio]).log()
                self._fallen += [fallen] if bool(fallen.isfinite().all()) else []
        if self._coming is not None:
            self.move(self._coming(sigma).to(y))
            self._coming = None
        return self.of(y)


def shares_of(latents: Sequence[Tensor], predictions: Sequence[Tensor], after: Tensor, most: float) -> list[float]:
    """How many times each of the latents, the latest first, is in ``after``, beside the predictions, the latest first.

    The latest latent alone, at most ``most`` times, unless earlier ones explain much of what it leaves: then the sampler
    goes back to them, and what it left in between (noise of its stages) is none of theirs.
    """
    device = after.device if after.device.type != "mps" else torch.device("cpu")  # which has no fp64
    known = [each.to(device, torch.float64).flatten() for each in predictions]
    given = [*(a - b for a, b in itertools.pairwise(known)), known[-1]]  # differences: predictions are alike
    wanted = after.to(device, torch.float64).flatten()

    def fitted(count: int) -> tuple[list[float], float]:
        """The shares of so many latents, and how much they and the predictions leave."""
        rows = torch.stack([*(each.to(device, torch.float64).flatten() for each in latents[:count]), *given])
        gram, target = (rows @ rows.T).cpu(), (rows @ wanted).cpu()
        size = gram.diagonal().clamp_min(1e-30).rsqrt()
        inverse = torch.linalg.pinv(gram * size * size[:, None], rtol=1e-10, hermitian=True)
        shares = (inverse @ (target * size)) * size
        return shares[:count].tolist(), float((wanted - shares.to(device) @ rows).norm())

    (share,), left = fitted(1)
    if len(latents) > 1 and left > ROUNDING * float(wanted.norm()):
        shares, less = fitted(len(latents))
        if less < MUCH * left:
            return shares
    return [min(max(share, 0.0), most)]


def framed(sampler: Any, frame: Callable[[], Frame | None], last_sigma: float) -> Any:
    """A copy of a KSAMPLER that works in ``frame()``; samplers of other kinds as they are (see :class:`FramedModel`)."""
    function = getattr(sampler, "sampler_function", None)
    if function is None:
        return sampler

    @functools.wraps(function)
    def sample(model: Any, *args: Any, **kwargs: Any) -> Tensor:
        now = frame()
        if now is None:
            return function(model, *args, **kwargs)
        return now.end(function(FramedModel(model, now), *args, **kwargs), last_sigma)

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
