"""``python -m rg_engine train``: trains a head from folders, on one process or on several that torchrun started."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ...errors import TrainingError
from ...guidance.pictures import without_frames
from ...guidance.targets import fit
from ...heads import ReadoutHead, save_head
from ...training import Examples, Progress
from ...training.config import TrainingConfig
from ...training.data.folders import FileExamples, gather_files, load_picture, prompt_of
from ...training.distributed import Ranks, joined
from ...training.new_head import as_controls, empty_value
from ...training.plot import loss_plot
from ..demo_model import NETWORKS, load_demo_model
from .head import train_head

ENCODED_AT_ONCE = 8


def train_from_files(config: TrainingConfig) -> None:
    """Train the head that ``config`` describes: writes it, a log (.jsonl), a loss plot (.png) and a checkpoint beside it.

    The checkpoint is gone when the head is there. Raises TrainingError.
    """
    files = gather_files(config)
    with joined() as ranks:
        with torch.inference_mode():
            model, clip, vae = load_model(config.model)
            latents = encode(files.pictures, vae, config.size)
            positive = prompts_of(config.prompt, files.pictures, clip)
            truth = _truth(config, files, latents, vae)
        with torch.inference_mode(False):
            examples = Examples(
                kind=config.kind,
                latents=latents.clone(),
                groups=files.groups,
                truth=None if truth is None else truth.clone(),
            )
        checkpoint, log = config.out.with_suffix(".checkpoint"), config.out.with_suffix(".jsonl")
        if ranks.first:
            cut_back(log, checkpoint)

        def keep(head: ReadoutHead) -> None:
            if ranks.first:
                path = config.out.with_name(f"{config.out.stem}_interrupted.safetensors")
                save_head(head, path)
                print(
                    f"the training broke off after {head.spec.training['steps']} steps; its best head is {path.name}",
                    flush=True,
                )

        head, history = train_head(
            model, examples, config.settings, name=config.out.name, positive=positive, projection=config.width,
            background=empty_value(config.kind, config.sparse), temperature=config.temperature, margin=config.margin,
            checkpoint=checkpoint, block=config.block,
            facts={"model": Path(config.model).name}, ranks=ranks, report=reporter(log, ranks), keep=keep,
        )  # fmt: skip
        if ranks.first:
            config.out.parent.mkdir(parents=True, exist_ok=True)
            partial = config.out.with_suffix(".partial")
            save_head(head, partial)
            os.replace(partial, config.out)
            plot = (loss_plot(history, config.out.stem)[0] * 255).round().to(torch.uint8).numpy()
            Image.fromarray(plot).save(config.out.with_suffix(".png"))
            checkpoint.unlink(missing_ok=True)
            print(f"wrote {config.out}", flush=True)


def load_model(name: str) -> tuple[Any, Any, Any]:
    for network in NETWORKS:
        if name == ("demo" if network == NETWORKS[0] else f"demo {network}"):
            return load_demo_model(network)
    if not Path(name).is_file():
        raise TrainingError(f"there is no checkpoint {name!r}: give the path of one, demo, or demo transformer")
    import comfy.sd

    model, clip, vae, *_ = comfy.sd.load_checkpoint_guess_config(name, output_vae=True, output_clip=True)
    if model is None or clip is None or vae is None:
        raise TrainingError(f"{Path(name).name!r} lacks its UNet, its text encoder or its VAE: give a complete checkpoint")
    return model, clip, vae


def encode(paths: list[Path], vae: Any, size_px: int) -> Tensor:
    parts = [paths[i : i + ENCODED_AT_ONCE] for i in range(0, len(paths), ENCODED_AT_ONCE)]
    return torch.cat(
        [without_frames(vae.encode(torch.stack([load_picture(p, size_px) for p in part]))).float().cpu() for part in parts]
    )


def prompts_of(prompt: str, pictures: list[Path], clip: Any) -> list:
    """A CONDITIONING: one row for all, or one a picture."""
    texts = [prompt_of(path) for path in pictures] if prompt == "captions" else [prompt]
    encoded = {text: clip.encode_from_tokens_scheduled(clip.tokenize(text))[0] for text in set(texts)}
    contexts = [encoded[text][0] for text in texts]
    if len({context.shape[1] for context in contexts}) > 1:
        raise TrainingError(
            "this model's text encoder makes as many tokens as a caption has words, and captions of several lengths can't "
            "be learned from together: give one prompt for all pictures"
        )
    facts = dict(encoded[texts[0]][1])
    if facts.get("pooled_output") is not None:
        facts["pooled_output"] = torch.cat([encoded[text][1]["pooled_output"] for text in texts])
    return [[torch.cat(contexts), facts]]


def _truth(config: TrainingConfig, files: FileExamples, latents: Tensor, vae: Any) -> Tensor | None:
    cells = (latents.shape[-2], latents.shape[-1])
    if files.controls is None:
        return fit(files.truth, cells) if config.kind == "keypoint" and files.truth is not None else files.truth
    if config.kind == "lgp":
        return encode(files.controls, vae, config.size)
    maps = torch.stack([fit(load_picture(path, config.size).permute(2, 0, 1)[None], cells)[0] for path in files.controls])
    return as_controls(maps)


def cut_back(log: Path, checkpoint: Path) -> None:
    """Leave in the log the steps that the checkpoint has; without one, none."""
    if not log.exists():
        return
    steps = 0
    with contextlib.suppress(Exception):  # a checkpoint that is missing or damaged is the training's to speak of
        steps = int(torch.load(checkpoint, map_location="cpu", weights_only=True)["step"])
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
    log.write_text("".join(lines[:steps]), encoding="utf-8")


def reporter(log: Path, ranks: Ranks) -> Any:
    """Writes a JSON line a step, prints validations."""
    if not ranks.first:
        return None
    log.parent.mkdir(parents=True, exist_ok=True)

    def report(progress: Progress) -> None:
        line = {"step": progress.step, "loss": progress.loss, "validation": progress.validation}
        with open(log, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if progress.validation is not None:
            print(
                f"step {progress.step} of {progress.steps}: loss {progress.loss:.5g}, validation {progress.validation:.5g}",
                flush=True,
            )

    return report
