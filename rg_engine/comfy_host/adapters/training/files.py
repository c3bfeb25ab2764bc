"""``python -m rg_engine train-oft``: trains an adapter from folders, on one process or on several that torchrun started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ....adapters import Adapter
from ....adapters.learning import AdapterExamples
from ....adapters.learning.config import OftConfig
from ....adapters.saving import save_native
from ....errors import TrainingError
from ....training import Progress
from ....training.data.folders import PICTURES
from ....training.distributed import joined
from ....training.plot import loss_plot
from ...training.files import cut_back, encode, load_model, prompts_of, reporter
from .train import train_adapter


def train_oft_from_files(config: OftConfig) -> None:
    """Train the adapter that ``config`` describes: writes it, a log (.jsonl), a loss plot (.png) and a checkpoint beside it.

    The checkpoint is gone when the adapter is there. Raises TrainingError.
    """
    pictures = _listed(config.pictures)
    of_class = None if config.class_pictures is None else _listed(config.class_pictures)
    with joined() as ranks:
        with torch.inference_mode():
            model, clip, vae = load_model(config.model)
            latents = encode(pictures, vae, config.size)
            class_latents = None if of_class is None else encode(of_class, vae, config.size)
            positive = prompts_of(config.prompt, pictures, clip)
            class_positive = None if of_class is None else prompts_of(config.class_prompt, of_class, clip)
        with torch.inference_mode(False):
            examples = AdapterExamples(
                latents=latents.clone(), class_latents=None if class_latents is None else class_latents.clone()
            )
        checkpoint, log = config.out.with_suffix(".checkpoint"), config.out.with_suffix(".jsonl")
        if ranks.first:
            cut_back(log, checkpoint)
        written = reporter(log, ranks)

        def report(progress: Progress, _shown: Tensor | None) -> None:
            if written is not None:
                written(progress)

        def keep(oft: Adapter) -> None:
            if ranks.first:
                path = config.out.with_name(f"{config.out.stem}_interrupted.safetensors")
                save_native(oft, path)
                print(
                    f"the training broke off after {oft.facts['steps']} steps; its best adapter is {path.name}", flush=True
                )

        oft, history, notes = train_adapter(
            model, examples, config.settings, positive=positive, class_positive=class_positive, checkpoint=checkpoint,
            ranks=ranks, graph="light" if config.light else "full", report=report, keep=keep,
            facts={"model": Path(config.model).name},
        )  # fmt: skip
        if ranks.first:
            save_native(oft, config.out)
            _save_plot(history, config.out)
            checkpoint.unlink(missing_ok=True)
            print("\n".join([*(f"note: {note}" for note in notes), f"wrote {config.out}"]), flush=True)


def _listed(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURES)
    if not found:
        raise TrainingError(f"there is no picture in {str(folder)!r}: expected {', '.join(PICTURES)}")
    return found


def _save_plot(history: Any, out: Path) -> None:
    plot = (loss_plot(history, out.stem)[0] * 255).round().to(torch.uint8).numpy()
    Image.fromarray(plot).save(out.with_suffix(".png"))
