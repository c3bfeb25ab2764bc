"""Pairs of demo pictures and their controls, drawn once and kept in files: ControlNets and heads learn from the same."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...comfy_host.training.node import graph_examples
from ...demo.scene_pictures import sample_scenes, scene_pictures
from ...demo.world import Scene
from ...training import Examples, in_a_row
from ..demo_heads import CHUNK, chunk_seed

CONTROLS = ("pose", "depth", "edges")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Pairs:
    """latents (N, 8, 16, 16); controls (N, 128, 128, C), bytes, of three channels or one; the scenes that they show."""

    latents: Tensor
    controls: Tensor
    scenes: list[Scene]

    def __len__(self) -> int:
        return len(self.scenes)

    def first(self, count: int) -> Pairs:
        return Pairs(latents=self.latents[:count], controls=self.controls[:count], scenes=self.scenes[:count])

    def pictures(self, rows: Tensor) -> Tensor:
        """Control pictures (n, 3, 128, 128) in 0..1, as a ControlNet takes them."""
        return (self.controls[rows].float() / 255).movedim(-1, 1).expand(-1, 3, -1, -1)

    def examples(self) -> Examples:
        """The same for a spatial head."""
        parts = [
            graph_examples("spatial", self.latents[rows], self.pictures(rows).movedim(1, -1))
            for rows in torch.arange(len(self)).split(CHUNK)
        ]
        truth = torch.cat([part.truth for part in parts if part.truth is not None])
        return in_a_row("spatial", self.latents, truth)


def draw_pairs(folder: Path, control: str, count: int, vae: Any, seed: int) -> Pairs:
    """The first ``count`` pairs of a seed, scenes of a figure alone; those that ``folder`` has not are drawn into it."""
    folder.mkdir(parents=True, exist_ok=True)
    latents, controls, scenes = [], [], []
    for first in range(0, count, CHUNK):
        path = folder / f"pairs_{seed}_{first:05d}.npz"
        if not path.exists():
            _draw(path, chunk_seed(seed, first), vae)
        with np.load(path) as chunk:
            latents.append(chunk["latents"])
            controls.append(chunk[control])
        scenes += sample_scenes(chunk_seed(seed, first), CHUNK, figure_only=True)
    with torch.inference_mode(False):
        drawn = Pairs(
            latents=torch.from_numpy(np.concatenate(latents)), controls=torch.from_numpy(np.concatenate(controls)),
            scenes=scenes,
        )  # fmt: skip
        return drawn.first(count)


def _draw(path: Path, seed: int, vae: Any) -> None:
    drawn = scene_pictures(seed, CHUNK, figure_only=True)
    with torch.inference_mode():
        latents = vae.encode(drawn.picture).float().cpu().numpy()
    layers = {name: (getattr(drawn, name) * 255).round().byte().numpy() for name in CONTROLS}
    unfinished = path.with_suffix(".partial.npz")
    np.savez(
        unfinished, latents=latents, pose=layers["pose"], depth=layers["depth"][..., :1], edges=layers["edges"][..., :1]
    )
    os.replace(unfinished, path)
