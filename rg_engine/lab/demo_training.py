"""Makes the demo model's files: ``python -m rg_engine train-demo``. Every part resumes where it was stopped."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ..comfy_host.demo_model import Denoiser, TransformerDenoiser
from ..comfy_host.demo_model.clip import Pair, tokens_of
from ..demo import AUTOENCODER, CLIP, DENOISER, ESTIMATOR, TRANSFORMER
from ..demo.autoencoder import Autoencoder
from ..demo.text import TextEncoder
from . import demo_parts
from .demo_clip import train_clip
from .demo_heads import train_demo_heads


def train_demo(parts: list[str], work: Path, options: Any) -> None:
    """Make the files of ``parts`` but the pictures, in order; ``work`` holds data and checkpoints, ``options`` are the
    command's."""
    data, device = work / "data", options.device
    for part in [p for p in demo_parts.PARTS[1:] if p in parts]:
        print(f"{part} ...", flush=True)
        if part == "autoencoder":
            demo_parts.train_autoencoder(
                data, work / AUTOENCODER.name, options.autoencoder_steps, options.autoencoder_batch, device
            )
            shutil.copy(work / AUTOENCODER.name, AUTOENCODER)
        elif part == "latents":
            demo_parts.encode_pictures(data, _autoencoder(device), device)
        elif part == "denoiser":
            torch.manual_seed(0)
            model = Denoiser().to(device)
            demo_parts.train_denoiser(
                model,
                model.predict,
                data,
                work / DENOISER.name,
                options.denoiser_steps,
                options.denoiser_batch,
                device=device,
            )
            shutil.copy(work / DENOISER.name, DENOISER)
        elif part == "transformer":
            torch.manual_seed(0)
            transformer = TransformerDenoiser().to(device)
            demo_parts.train_transformer(
                transformer,
                torch.compile(transformer.predict) if options.compile else transformer.predict,
                _text_encoder(device),
                data,
                work / TRANSFORMER.name,
                options.transformer_steps,
                options.transformer_batch,
                device=device,
            )
            shutil.copy(work / TRANSFORMER.name, TRANSFORMER)
        elif part == "estimator":
            torch.manual_seed(0)
            demo_parts.train_estimator(
                data, _autoencoder(device), work / ESTIMATOR.name, options.estimator_steps, options.estimator_batch, device
            )
            shutil.copy(work / ESTIMATOR.name, ESTIMATOR)
        elif part == "clip":
            torch.manual_seed(0)
            train_clip(
                Pair(),
                tokens_of,
                data,
                work / CLIP.name,
                _autoencoder(device),
                options.clip_steps,
                options.clip_batch,
                device,
            )
            shutil.copy(work / CLIP.name, CLIP)
        else:
            train_demo_heads(work / "heads", names=options.heads, network=options.network)


def _text_encoder(device: str) -> Any:
    model = TextEncoder().to(device)
    state = {key[len("text.") :]: value.float() for key, value in load_file(DENOISER).items() if key.startswith("text.")}
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


def _autoencoder(device: str) -> Any:
    model = Autoencoder().to(device)
    model.load_state_dict({key: value.float() for key, value in load_file(AUTOENCODER).items()})
    return model.eval().requires_grad_(False)
