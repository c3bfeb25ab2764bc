"""Scenes of the demo world as batches of pictures, with everything that is true about them."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from .render import edge_map, joint_heatmaps, pose_map, render, scene_tracks
from .world import SUBJECT, Scene, sample_elsewhere, sample_other_identity, sample_scene

#: scenes: one by one; pairs: the same things elsewhere, two in a row; triplets: and the same scene with another figure.
Sequence = Literal["scenes", "pairs", "triplets"]
SEQUENCES: tuple[Sequence, ...] = get_args(Sequence)
HEATMAP_PX = 32
TRACKED_POINTS = 32


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ScenePictures:
    """N pictures of 128 pixels square.

    picture, pose, depth, edges (N, 128, 128, 3) in 0..1; keypoints (N, 14, 32, 32) in 0..1, a heat map a joint; figure
    (N, 128, 128), 1 where the figure is; tracks (N / 2, 32, 2, 2) of pairs, [point, picture, (x, y)] as fractions, NaN where
    there are fewer.
    """

    scenes: list[Scene]
    picture: Tensor
    pose: Tensor
    depth: Tensor
    edges: Tensor
    keypoints: Tensor
    figure: Tensor
    tracks: Tensor

    @property
    def captions(self) -> list[str]:
        return [scene.caption() for scene in self.scenes]


def sample_scenes(seed: int, count: int, figure_only: bool = False, sequence: Sequence = "scenes") -> list[Scene]:
    """Scenes of a seed; the first ones are the same whatever the count, which counts scenes, pairs or triplets."""
    found: list[Scene] = []
    for i in range(count):
        rng = np.random.default_rng([seed, i])
        if sequence == "scenes":
            found.append(sample_scene(rng, figure_only=figure_only))
            continue
        scene = sample_scene(rng, figure_only=figure_only)
        while scene.figure is None:
            scene = sample_scene(rng)
        found += [scene, sample_elsewhere(rng, scene)]
        if sequence == "triplets":
            found.append(sample_elsewhere(rng, scene, sample_other_identity(rng, scene.figure.identity)))
    return found


def scene_pictures(seed: int, count: int, figure_only: bool = False, sequence: Sequence = "scenes") -> ScenePictures:
    """Draw the scenes of a seed."""
    scenes = sample_scenes(seed, count, figure_only, sequence)
    drawn = [render(scene) for scene in scenes]
    tracks = (
        np.full((count, TRACKED_POINTS, 2, 2), np.nan, np.float32)
        if sequence == "pairs"
        else np.empty((0, TRACKED_POINTS, 2, 2), np.float32)
    )
    for i in range(len(tracks)):
        rng = np.random.default_rng([seed, i, 1])
        a, b = 2 * i, 2 * i + 1
        points = scene_tracks(scenes[a], scenes[b], drawn[a].parts, drawn[b].parts, TRACKED_POINTS, rng)
        tracks[i, : len(points)] = points
    return ScenePictures(
        scenes=scenes,
        picture=_stack([each.image / np.float32(255) for each in drawn]),
        pose=_stack([pose_map(scene.figure) / np.float32(255) for scene in scenes]),
        depth=_stack([np.repeat(each.depth.clip(0, 1)[..., None], 3, -1) for each in drawn]),
        edges=_stack([np.repeat(edge_map(each.image)[..., None], 3, -1) for each in drawn]),
        keypoints=_stack([joint_heatmaps(scene.figure, HEATMAP_PX, spread=0.05) for scene in scenes]),
        figure=_stack([each.figure_mask for each in drawn]),
        tracks=torch.from_numpy(tracks),
    )


def subject_pictures(seed: int, count: int) -> tuple[Tensor, list[Scene]]:
    """SUBJECT alone in so many scenes, (count, 128, 128, 3) in 0..1: poses, places and walls of the world."""
    scenes = [sample_scene(np.random.default_rng([seed, i, 2]), SUBJECT, figure_only=True) for i in range(count)]
    return _stack([render(scene).image / np.float32(255) for scene in scenes]), scenes


def _stack(layers: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(layers).astype(np.float32))
