"""The source pass: the unguided run of the same seed, whose readouts a drag or an appearance target is compared with.

Passes are kept between runs, by everything that determines them: the next drag on the same picture needs none.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import types
import weakref
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from ...guidance import SourceStep

MOST_PASSES = 4
#: What changes from run to run without changing the source.
IGNORED = {"uuid", "sample_sigmas", "readout_guidance"}


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


class SourcePasses:
    """The last few source passes, by fingerprint."""

    def __init__(self, most: int = MOST_PASSES) -> None:
        self._most = most
        self._kept: OrderedDict[str, tuple[SourcePass, list[Any]]] = OrderedDict()

    def find(self, fingerprint: Fingerprint) -> SourcePass | None:
        """The pass of this fingerprint; one that was made with an object that is gone does not count."""
        found = self._kept.get(fingerprint.digest)
        if found is None or any(same() is not now for same, now in zip(found[1], fingerprint.objects, strict=False)):
            return None
        self._kept.move_to_end(fingerprint.digest)
        return found[0]

    def keep(self, fingerprint: Fingerprint, source: SourcePass) -> None:
        references = [_reference(each) for each in fingerprint.objects]
        self._kept[fingerprint.digest] = (source, references)
        self._kept.move_to_end(fingerprint.digest)
        while len(self._kept) > self._most:
            self._kept.popitem(last=False)


class Fingerprint:
    """A digest of nested values: tensors by content, plain values as they are, other objects by identity."""

    def __init__(self, *values: Any) -> None:
        self.objects: list[Any] = []
        self._hash = hashlib.blake2b(digest_size=20)
        for value in values:
            self._add(value)
        self.digest = self._hash.hexdigest()

    def _add(self, value: Any) -> None:
        if isinstance(value, Tensor):
            self._tag(f"tensor {tuple(value.shape)} {value.dtype}")
            plain = value.detach().to("cpu").contiguous()
            self._hash.update(plain.flatten().view(torch.uint8).numpy().tobytes())
        elif value is None or isinstance(value, (bool, int, float, str, bytes, complex)):
            self._tag(f"{type(value).__name__} {value!r}")
        elif isinstance(value, dict):
            self._tag(f"dict {len(value)}")
            for key in value:
                if key not in IGNORED:
                    self._add(key)
                    self._add(value[key])
        elif isinstance(value, (list, tuple, set, frozenset)):
            self._tag(f"list {len(value)}")
            for item in value:
                self._add(item)
        elif hasattr(value, "cond") and type(value).__module__ == "comfy.conds":
            self._tag(type(value).__name__)
            self._add(value.cond)
        else:
            self._tag(f"object {type(value).__name__}")
            self._hash.update(str(id(value)).encode())
            self.objects.append(value)

    def _tag(self, text: str) -> None:
        self._hash.update(text.encode() + b"\0")


def _reference(value: Any) -> Any:
    """A weak reference, or where there can be none (a bound method, which is made anew each time) a strong one."""
    try:
        return weakref.ref(value)
    except TypeError:
        return lambda: value


def _moved(step: SourceStep, device: torch.device, dtype: torch.dtype | None) -> SourceStep:
    return SourceStep(
        readouts={i: readout.to(device, dtype or readout.dtype) for i, readout in step.readouts.items()},
        z_min=step.z_min.to(device), z_max=step.z_max.to(device),
    )  # fmt: skip
