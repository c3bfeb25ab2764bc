"""One combination, tried: unguided, then guided, measured, and the model looked at before and after."""

from __future__ import annotations

import dataclasses
import io
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any, Literal

import torch
from torch import Tensor

from ...guidance import GuidanceSettings, Target
from .bench import Bench, Guide, guided
from .fingerprint import Fingerprint, changed, fingerprint, network_state, patcher_state
from .loading import Kept, without_paths

Unit = Literal["px", "readout"]
#: How an estimator error compares with that of ComfyUI's euler, and a readout's with the unguided one's.
AS_GOOD, HALF = 1.5, 0.5
#: The deviation of finished latents, over that of euler's, outside which a picture is garbage; and over the unguided one's.
CLEAN, AS_WIDE = (0.7, 1.4), (0.8, 1.25)
LONGEST_MESSAGE = 240
DEFAULTS = GuidanceSettings()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Combination:
    """nodes: what of the pack is used; tried: how. run(bench, guide) makes latents (B, 8, h, w) or pictures (B, H, W, 3)
    in 0..1, with ``guide`` where a user would put Apply Readout Guidance. unit: the figure that makes sense; same: whether,
    unguided, it should be what KSampler makes; settings, of the guidance; nothing: whether guidance should do nothing.
    """

    nodes: str
    tried: str
    run: Callable[[Bench, Guide], Tensor]
    unit: Unit = "px"
    same: bool = False
    nothing: bool = False
    settings: GuidanceSettings = DEFAULTS


@dataclasses.dataclass(kw_only=True)
class Row:
    """What came of a combination; figures in ``unit``, NaN where there is none."""

    pack: str
    nodes: str
    tried: str
    unit: Unit
    unguided: float = float("nan")
    guided: float = float("nan")
    other: tuple[float, float] = (float("nan"), float("nan"))  # the figures in the other unit
    std: tuple[float, float] = (float("nan"), float("nan"))  # of the finished latents, unguided and guided
    from_plain: float = float("nan")  # RMS of the unguided picture's difference from KSampler's
    effect: float = float("nan")  # RMS of the guided picture's difference from the unguided one
    restored: bool | None = None
    left: list[str] = dataclasses.field(default_factory=list)  # what was not restored
    losses: list[str] = dataclasses.field(default_factory=list)  # what the runs logged
    said: list[str] = dataclasses.field(default_factory=list)  # warnings
    failed: str = ""
    verdict: str = ""
    seconds: tuple[float, float] = (0.0, 0.0)
    comfyui: str = ""
    same: bool = False  # whether, unguided, it should be what KSampler makes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plain:
    """ComfyUI's euler by itself: its pictures, and its errors unguided and guided."""

    pictures: Tensor
    unguided: float
    guided: float
    std: float


@torch.inference_mode()
def plain(bench: Bench) -> Plain:
    latents = bench.ksampler(bench.model)
    steered = bench.ksampler(guided(bench.model, bench.target(), GuidanceSettings()))
    errors = [bench.pose_error(bench.decode(each)) for each in (latents, steered)]
    return Plain(pictures=bench.decode(latents), unguided=errors[0], guided=errors[1], std=float(latents.std()))


@torch.inference_mode()
def attempt(bench: Bench, pack: str, combination: Combination, base: Plain, comfyui: str) -> Row:
    """Try a combination; whatever it raises is in its row."""
    row = Row(pack=pack, nodes=combination.nodes, tried=combination.tried, unit=combination.unit, same=combination.same)
    row.comfyui = comfyui
    given: list[tuple[Any, Fingerprint]] = []

    def as_it_was(model: Any, target: Target | None = None) -> Any:
        own = {} if model.model is bench.model.model else network_state(model)  # that of a network made for this run
        given.append((model, {**patcher_state(model), **own}))
        return model

    def steered(model: Any, target: Target | None = None) -> Any:
        as_it_was(model)
        return guided(model, bench.target() if target is None else target, combination.settings)

    try:
        began = time.perf_counter()
        with redirect_stdout(io.StringIO()):
            unguided = combination.run(bench, as_it_was)
        row.seconds = (time.perf_counter() - began, 0.0)
        before = _unloaded(bench)
        own = _left(given)  # what the pack itself changes on the patchers that it is given
    except Exception as error:
        row.failed = f"unguided: {_words(error)}"
        row.verdict = "not tried"
        return row
    given.clear()
    with _listening() as kept, redirect_stdout(io.StringIO()):
        try:
            began = time.perf_counter()
            result = combination.run(bench, steered)
            row.seconds = (row.seconds[0], time.perf_counter() - began)
        except Exception as error:
            refused = any(kind.__name__ == "ReadoutGuidanceError" for kind in type(error).__mro__)
            row.failed = f"{'refused' if refused else 'failed'}: {_words(error)}"
            result = None
    after = _unloaded(bench)
    row.left = changed(before, after) + [name for name in _left(given) if name not in own]
    row.restored = not row.left
    for record in kept.records:
        lines = row.said if record.levelno >= logging.WARNING else row.losses
        if record.getMessage() not in lines:
            lines.append(record.getMessage())
    _measure(bench, row, unguided, result, base)
    row.verdict = verdict(combination, row, base)
    return row


def verdict(combination: Combination, row: Row, base: Plain) -> str:
    """A word on a row."""
    if row.failed:
        return row.failed.partition(":")[0]
    if not _finite(row.unguided) or not CLEAN[0] <= row.std[0] / base.std <= CLEAN[1]:
        return "broken unguided"
    if row.effect == 0:
        return "as asked: no guidance" if combination.nothing else "no effect"
    if not _finite(row.guided) or not AS_WIDE[0] <= row.std[1] / row.std[0] <= AS_WIDE[1]:
        return "broken"
    if combination.unit == "px" and row.guided <= AS_GOOD * base.guided:
        return "holds"
    if row.guided <= HALF * row.unguided:
        return "holds" if combination.unit == "readout" else "partly"
    return "weakly" if row.guided < row.unguided else "worse"


def _measure(bench: Bench, row: Row, unguided: Tensor, result: Tensor | None, base: Plain) -> None:
    shown = []
    for made in [unguided] if result is None else [unguided, result]:
        pictures, latents = (made, None) if made.shape[-1] == 3 else (bench.decode(made.clone()), made)
        if not bool(torch.isfinite(made).all()):
            shown.append((pictures, float("nan"), float("nan"), float("nan")))
            continue
        latents = bench.encode(pictures) if latents is None else latents
        shown.append((pictures, bench.pose_error(pictures), bench.readout_error(latents), float(latents.std())))
    (first, error, readout, std), last = shown[0], shown[-1]
    both = {"px": (error, last[1]), "readout": (readout, last[2])}
    if len(shown) == 1:
        both = {unit: (figures[0], float("nan")) for unit, figures in both.items()}
    (row.unguided, row.guided), row.other = both.pop(row.unit), both.popitem()[1]
    row.std = (std, last[3])
    if first.shape == base.pictures.shape:
        row.from_plain = _rms(first - base.pictures)
    if result is not None:
        row.effect = _rms(last[0] - first)


def _rms(difference: Tensor) -> float:
    return float(difference.float().square().mean().sqrt())


def _finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")


def _left(given: list[tuple[Any, Fingerprint]]) -> list[str]:
    """What of the patchers that were given is not as it was."""
    found = []
    for model, state in given:
        own = network_state(model) if any(name.startswith("weight ") for name in state) else {}
        found += [f"given: {name}" for name in changed(state, {**patcher_state(model), **own})]
    return found


def _unloaded(bench: Bench) -> Fingerprint:
    """The demo model's fingerprint with its weights as they are in its file."""
    import comfy.model_management

    comfy.model_management.unload_all_models()
    return fingerprint(bench.model)


def _words(error: BaseException) -> str:
    words = without_paths(" ".join(str(error).split()))
    return f"{type(error).__name__}: {words[:LONGEST_MESSAGE]}"


@contextmanager
def _listening() -> Iterator[Kept]:
    """What this extension logs meanwhile."""
    log, kept = logging.getLogger("readout_guidance"), Kept()
    level = log.level
    log.addHandler(kept)
    log.setLevel(logging.INFO)
    try:
        yield kept
    finally:
        log.removeHandler(kept)
        log.setLevel(level)
