"""Scenes of the demo world as batches of pictures."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .render import edge_map, pose_map, render
from .world import Scene, sample_scene


def sample_scenes(seed: int, count: int, figure_only: bool = False) -> list[Scene]:
    """Scenes of a seed; the first ones are the same whatever the count."""
    return [sample_scene(np.random.default_rng([seed, i]), figure_only=figure_only) for i in range(count)]


def scene_pictures(seed: int, count: int, figure_only: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor, str]:
    """Picture, pose, depth and edges of scenes, each (count, 128, 128, 3) in 0..1, and the first one's caption."""
    scenes = sample_scenes(seed, count, figure_only)
    layers: tuple[list[np.ndarray], ...] = ([], [], [], [])
    for scene in scenes:
        drawn = render(scene)
        maps = (
            drawn.image / np.float32(255),
            pose_map(scene.figure) / np.float32(255),
            np.repeat(drawn.depth.clip(0, 1)[..., None], 3, -1),
            np.repeat(edge_map(drawn.image)[..., None], 3, -1),
        )
        for layer, picture in zip(layers, maps, strict=True):
            layer.append(picture.astype(np.float32))
    pictures, poses, depths, edges = (torch.from_numpy(np.stack(layer)) for layer in layers)
    return pictures, poses, depths, edges, scenes[0].caption()
