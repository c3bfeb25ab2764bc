"""What a run says when it has ended, on the node and in the log: what was done, what was not, and the way out."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

import comfyui_version
import torch
from torch import Tensor

from ...guidance import GuidanceSettings, Target
from ...guidance.schedule import percent_of
from ...version import VERSION
from .run import Run

log = logging.getLogger("readout_guidance")
#: A loss that has risen by more than this part of it is worth a word.
RISEN = 0.05
#: Moves that fall faster with the noise are mostly gone before the next one.
FADING = 3.0
PERCENTS = [number / 100 for number in range(101)]


def report_start(run: Run, device: torch.device) -> None:
    """Of a guided run that begins: a line in the log with all that a question about it needs to say."""
    heads = dict.fromkeys(f"{target.head.name} ({target.head.spec.kind})" for target in run.targets)
    log.info(
        "Readout Guidance %s (ComfyUI %s, torch %s, %s): backbone %s, heads %s, mode %s, strength %g, graph %s",
        VERSION, comfyui_version.__version__, torch.__version__, device, run.backbone.name, ", ".join(heads),
        run.settings.mode, run.settings.strength, run.graph,
    )  # fmt: skip


def report_run(run: Run) -> None:
    """Of a guided run."""
    steps, done = max(len(run.sigmas) - 1, 0), len(run.guided)
    words = f"guided {done} of {steps} steps"
    if run.losses:
        first, last = (float(loss.mean()) for loss in (run.losses[0], run.losses[-1]))
        words += f", loss {first:.4g} -> {last:.4g}"
    if run.seconds_added is not None:
        words += f", {max(run.seconds_added, 0.0):.1f} s added"
    if run.kept_prompt is not None and run.kept_prompt.left_out:
        words += f"; {run.kept_prompt.left_out} of them without the negative prompt's pass"
    planned = len(run.plan.steps)
    warnings = [f"{count} of {planned} planned steps were not guided: {why}" for why, count in run.skipped.items()]
    if run.steps is not None and run.steps.missed:
        warnings.append(
            f"{run.steps.missed} of {planned} planned steps did not come: the sampler did not call the model at or below "
            "their noise levels. Use another sampler for full control"
        )
    if run.frame is not None and run.frame.apart:
        warnings.append(
            f"in {run.frame.apart} calls the sampler gave the model pictures of another size than its latent's, where moves "
            "do not arrive. Turn the sampler's own tiles off"
        )
    often = run.settings.mode != "fast" or run.settings.iterations > 1
    if run.frame is not None and run.frame.fading > FADING and not often:
        warnings.append(
            "the sampler renews its noise several times a step, and moves fade with it (with the power "
            f"{run.frame.fading:.1f} of the noise level; of most samplers it is 1 to 2). If the picture does not follow, "
            "set iterations to 2"
        )
    if run.losses and not all(map(torch.isfinite, run.losses[-1])):
        warnings.append("the loss is not finite; pictures with such a loss were not moved")
    elif run.losses and last - first > RISEN * abs(first):
        warnings.append(
            f"the loss rose from {first:.4g} to {last:.4g}: try a lower strength, more steps, or less weight on one target"
        )
    say(words, warnings)


def report_empty_plan(
    targets: Sequence[Target], settings: GuidanceSettings, sigmas: list[float], percent_to_sigma: Callable[[float], Any]
) -> None:
    """Of a run without a guided step."""
    if not targets:
        say("not guided", ["no target reaches into this crop, so it was made as without guidance"])
        return
    first, last = (percent_of(sigma, lambda p: float(percent_to_sigma(p))) for sigma in (sigmas[0], sigmas[-1]))
    start, end = min(target.start_percent for target in targets), max(target.end_percent for target in targets)
    reach = (
        f"sampling goes from {first:.2f} to {last:.2f} of the diffusion time and the target guides from {start:g} to {end:g}"
    )
    if last < first:
        why, cure = "the noise levels rise", "guide the way down instead"
    elif first >= end - 1e-3:
        why, cure = reach, f"raise end_percent above {first:.2f}, or denoise more"
    elif last <= start:
        why, cure = reach, f"lower start_percent below {last:.2f}"
    elif not any(settings.strongest_at(at) and _counts(target, at) for target in targets for at in PERCENTS):
        why, cure = f"keyframes hold it at 0 between {start:g} and {end:g} of the diffusion time", "raise one of them there"
    else:
        why, cure = f"no step lies between {start:g} and {end:g} of the diffusion time", "use more steps, or a wider range"
    say("not guided", [f"no step was guided, so the picture is the unguided one: {why}. To guide, {cure}"])


def _counts(target: Target, percent: float) -> bool:
    return target.start_percent <= percent <= target.end_percent and target.counts_at(percent)


class Repetitions:
    """Looks whether one node samples again and again from pictures: it may be cutting one up."""

    def __init__(self) -> None:
        self._last: Any = None
        self._told = False

    def look(self, latent_image: Tensor | None) -> None:
        now = executing()
        place = None if now is None else (now.prompt_id, now.node_id, getattr(now, "list_index", None))
        again = place is not None and place == self._last and latent_image is not None and bool(latent_image.any())
        if again and not self._told:
            say("", [
                "this node samples several pictures with the guided model, and each was compared with the whole control. If "
                "they are crops or tiles of one picture, put Follow Crops on the positive prompt"
            ])  # fmt: skip
        self._last, self._told = place, again


def say(words: str, warnings: Sequence[str] = ()) -> None:
    """One line on the node that runs and in the log; warnings after it."""
    if words:
        log.info("Readout guidance: %s", words)
    for warning in warnings:
        log.warning("Readout guidance: %s.", warning)
    show(". ".join([*([words] if words else []), *(f"Warning: {warning}" for warning in warnings)]))


def show(words: str) -> None:
    """Show ``words`` on the node that runs, where a page is listening."""
    server, now = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None), executing()
    if server is not None and now is not None and server.client_id is not None:
        server.send_progress_text(words, now.node_id, server.client_id)


def executing() -> Any:
    """Which node of which prompt runs; None outside of ComfyUI's executor."""
    utils = sys.modules.get("comfy_execution.utils")
    return None if utils is None else utils.get_executing_context()
