"""Makes the demo model's files: ``python -m rg_engine train-demo``. Every part resumes where it was stopped."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from ..demo import AUTOENCODER, DEMO_HEADS, DENOISER, ESTIMATOR, train
from ..demo.autoencoder import Autoencoder
from ..demo.render import edge_map, pose_map
from ..guidance.targets import fit
from ..heads import AggregationNetwork, HeadSpec, save_head
from ..training import HeadTraining, balanced_mse, train_heads
from ..training.loop import log_losses
from .demo_model import Denoiser, load_demo_model
from .frozen_features import FrozenFeatures

PARTS = ("pictures", "autoencoder", "latents", "denoiser", "estimator", "heads")
CONTROL_RANGE = (-0.5, 0.5)
#: The demo's spatial heads: channels, and the empty value of sparse controls.
SPATIAL_HEADS: dict[str, tuple[int, float | None]] = {"pose": (3, -0.5), "depth": (1, None), "edges": (1, -0.5)}


def train_demo(parts: list[str], work: Path, device: str, shards: int, steps: dict[str, int]) -> None:
    """Make the files of ``parts`` in order; ``work`` holds data and checkpoints."""
    data = work / "data"
    for part in [p for p in PARTS if p in parts]:
        print(f"{part} ...", flush=True)
        if part == "pictures":
            train.make_pictures(data, shards)
        elif part == "autoencoder":
            train.train_autoencoder(data, work / AUTOENCODER.name, steps[part], device=device)
            shutil.copy(work / AUTOENCODER.name, AUTOENCODER)
        elif part == "latents":
            train.encode_pictures(data, _autoencoder(device), device)
        elif part == "denoiser":
            torch.manual_seed(0)
            model = Denoiser().to(device)
            train.train_denoiser(model, model.predict, data, work / DENOISER.name, steps[part], device=device)
            shutil.copy(work / DENOISER.name, DENOISER)
        elif part == "estimator":
            torch.manual_seed(0)
            train.train_estimator(data, _autoencoder(device), work / ESTIMATOR.name, steps[part], device=device)
            shutil.copy(work / ESTIMATOR.name, ESTIMATOR)
        else:
            train_spatial_heads(data, work / "heads", steps[part])


def train_spatial_heads(data: Path, work: Path, steps: int, pairs: int = 20000, batch: int = 12) -> None:
    """Train the pose, depth and edge heads together on one set of pairs (they share the frozen model's features)."""
    work.mkdir(parents=True, exist_ok=True)
    model, clip, _ = load_demo_model()
    frozen = FrozenFeatures(model)
    latents, captions, controls = _pairs(data, pairs)
    contexts = {caption: clip.encode(caption)[0].clone() for caption in {"", *captions}}
    cells = (latents.shape[-2], latents.shape[-1])
    torch.manual_seed(0)
    trainings = [
        HeadTraining(
            name=f"demo_{name}.safetensors",
            network=AggregationNetwork(
                frozen.backbone.channels,
                projection_channels=64,
                hidden=32,
                emb_width=frozen.backbone.emb_width,
                output_channels=channels,
            ).to(frozen.device),
            spec=HeadSpec(
                kind="spatial", feature_channels=frozen.backbone.channels, taps=frozen.backbone.taps, backbone="demo model",
                control_range=CONTROL_RANGE, training={"pairs": len(latents), "control": name},
            ),
            loss=_control_loss(name, empty),
        )
        for name, (channels, empty) in SPATIAL_HEADS.items()
    ]  # fmt: skip

    def make_batch(step: int) -> tuple[list[Tensor], Tensor, dict[str, Tensor]]:
        rng, generator = np.random.default_rng([31, step]), torch.Generator().manual_seed(step)
        pick = rng.integers(len(latents), size=batch)
        x0 = latents[torch.from_numpy(pick)].float()
        timestep = torch.from_numpy(rng.integers(0, 1000, size=batch))
        words = torch.stack([contexts[captions[i] if rng.random() < 0.5 else ""] for i in pick])
        noise = torch.randn(x0.shape, generator=generator)
        on = [t.to(frozen.device) for t in (x0, words, timestep, noise)]
        truth = {name: maps[torch.from_numpy(pick)].float().to(frozen.device) for name, maps in controls.items()}
        return *frozen(*on), truth

    heads = train_heads(
        trainings,
        make_batch,
        size=cells,
        steps=steps,
        checkpoint=work / "heads.state",
        report=log_losses(work / "heads.log"),
    )
    DEMO_HEADS.mkdir(parents=True, exist_ok=True)
    for head in heads:
        save_head(head, DEMO_HEADS / head.name, dtype=torch.float16)


def _control_loss(name: str, background: float | None) -> Callable[[Tensor, dict[str, Tensor]], Tensor]:
    return lambda readout, truth: balanced_mse(readout, truth[name], background=background)


def _pairs(data: Path, count: int) -> tuple[Tensor, list[str], dict[str, Tensor]]:
    """Latents (N, 8, 16, 16), captions, and each control (N, D, 16, 16) in CONTROL_RANGE."""
    latents: list[Tensor] = []
    captions: list[str] = []
    controls: dict[str, list[Tensor]] = {name: [] for name in SPATIAL_HEADS}
    for path in sorted(data.glob("latents_*.npz")):
        if len(captions) >= count:
            break
        coded, drawn = np.load(path), np.load(path.with_name(path.name.replace("latents", "pictures")))
        take = min(count - len(captions), len(coded["captions"]))
        latents.append(torch.from_numpy(coded["latents"][:take]))
        captions += [str(c) for c in coded["captions"][:take]]
        images, depth, joints = drawn["images"], drawn["depth"], drawn["joints"]
        for i in range(take):
            has_figure = not np.isnan(joints[i]).any()
            maps = {
                "pose": pose_map(joints[i] if has_figure else None) / np.float32(255),
                "depth": depth[i].astype(np.float32)[..., None].clip(0, 1),
                "edges": edge_map(images[i])[..., None],
            }
            for name, picture in maps.items():
                small = fit(torch.from_numpy(picture).permute(2, 0, 1)[None], (16, 16))
                controls[name].append((small - 0.5).half())
    return torch.cat(latents), captions, {name: torch.cat(maps) for name, maps in controls.items()}


def _autoencoder(device: str) -> Any:
    model = Autoencoder().to(device)
    model.load_state_dict({key: value.float() for key, value in load_file(AUTOENCODER).items()})
    return model.eval().requires_grad_(False)
