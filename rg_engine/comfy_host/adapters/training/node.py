"""What the Train OFT node does around a training: progress, previews, its report, and what an interrupt leaves."""

from __future__ import annotations

import dataclasses
import logging
import time
from typing import Any

import comfy.model_management
import comfy.utils
import latent_preview
import torch
from torch import Tensor

from ....adapters import Adapter
from ....adapters.learning import AdapterExamples, OftSettings
from ....errors import TrainingError
from ....training import Progress
from ....training.plot import loss_plot
from ...folders import OFT_FOLDERS, checkpoint_path
from ...loaded.gradient_scope import Graph
from ..apply import apply, fit
from ..report import describe
from ..save import save_oft
from .train import Preview, train_adapter

log = logging.getLogger("readout_guidance")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Trained:
    model: Any
    oft: Adapter
    plot: Tensor
    report: str


def train_oft_in_graph(
    model: Any, positive: Any, latents: dict[str, Any], settings: OftSettings, *, class_positive: Any, class_latents: Any,
    negative: Any, graph: Graph, preview: Preview, checkpoint: str,
) -> Trained:  # fmt: skip
    """The adapter, on a clone of the model. An interrupt leaves the best adapter so far in models/oft, and goes on."""
    path = checkpoint_path(checkpoint, OFT_FOLDERS[0]) if checkpoint.strip() else None
    with torch.inference_mode(False):
        examples = AdapterExamples(
            latents=_plain(latents), class_latents=None if class_latents is None else _plain(class_latents)
        )
    bar = comfy.utils.ProgressBar(settings.steps)
    shows = _previewer(model.model.latent_format) if preview.every else None
    latest: list[Any] = [None]

    def report(progress: Progress, shown: Tensor | None) -> None:
        if shown is not None and shows is not None:
            latest[0] = shows.decode_latent_to_preview_image("JPEG", model.model.process_latent_in(shown[:1]))
        if progress.validation is not None:
            log.info("Train OFT, step %d of %d: validation %.5g", progress.step, progress.steps, progress.validation)
        bar.update_absolute(progress.step, progress.steps, latest[0])

    def keep(oft: Adapter) -> None:
        name = save_oft(oft, "interrupted_oft", "native", None, overwrite=True)
        log.warning("The training broke off after %d steps; its best adapter is %s.", oft.facts["steps"], name)

    began = time.monotonic()
    oft, history, notes = train_adapter(
        model, examples, settings, positive=positive, class_positive=class_positive, negative=negative, graph=graph,
        checkpoint=path, preview=preview, report=report, keep=keep,
    )  # fmt: skip
    found = fit(oft, model)
    text = "\n".join([
        describe("Train OFT", oft, found, model, 1.0),
        f"{oft.facts['steps']} steps in {time.monotonic() - began:.0f} s, "
        f"{sum(layer.rotation.q.shape[0] for layer in oft.layers)} blocks; loss {history[0][1]:.4g} in the first step, "
        f"{history[-1][1]:.4g} in the last",
        *(f"note: {note}" for note in notes),
    ])  # fmt: skip
    log.info("Train OFT: %s", text.replace("\n", "; "))
    turned, _ = apply(found, model, None, 1.0, 0.0)
    return Trained(model=turned, oft=oft, plot=loss_plot(history, "OFT"), report=text)


def _previewer(latent_format: Any) -> Any:
    """ComfyUI's way of showing latents, also where previews are off: these were asked for. None if the format has none."""
    chosen = latent_preview.get_previewer(comfy.model_management.get_torch_device(), latent_format)
    if chosen is None and latent_format.latent_rgb_factors is not None:
        chosen = latent_preview.Latent2RGBPreviewer(latent_format.latent_rgb_factors, latent_format.latent_rgb_factors_bias)
    if chosen is None:
        log.warning("Train OFT: latents of this model can't be shown, so there are no previews: set preview_every to 0.")
    return chosen


def _plain(latents: dict[str, Any]) -> Tensor:
    samples = latents["samples"]
    if not isinstance(samples, Tensor) or samples.is_nested:
        raise TrainingError("the latents are no batch of pictures: connect VAE Encode")
    return samples.clone().float().cpu()
