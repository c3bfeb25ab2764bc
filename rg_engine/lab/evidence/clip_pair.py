"""The table of ``evaluate`` on the demo world's picture-text pair: does it know a caption from those an attribute apart?

Read by the same code as any CLIP of CLIP Loss's, on scenes that it has not seen, as they are and rebuilt by the autoencoder.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...comfy_host.demo_model.clip import load_demo_clip
from ...comfy_host.optimized.measured.vision import PictureEncoder, text_feature
from ...demo.measure import mean_and_error
from ...demo.scene_pictures import scene_pictures
from ...demo.wording import ATTRIBUTES, variants
from ..demo_world import World
from ..steering import SCENE_SEED

SCENES_A_PICTURE = 8  # so many scenes for each of ``--pictures``


def clip_table(world: World) -> list[dict[str, Any]]:
    """By attribute: in how many scenes the right caption is the nearest of those that differ in this attribute alone."""
    scenes = scene_pictures(SCENE_SEED + 500, SCENES_A_PICTURE * world.pictures)
    vision, clip = load_demo_clip()
    encoder = PictureEncoder(vision)
    feature = functools.cache(lambda caption: text_feature(clip, caption, encoder.width))
    rebuilt = torch.cat([world.vae.decode(world.vae.encode(part)) for part in scenes.picture.split(16)]).clamp(0, 1)
    views = {"rendered": encoder.of_pictures(scenes.picture), "rebuilt": encoder.of_pictures(rebuilt)}
    right: dict[str, dict[str, list[bool]]] = {name: {view: [] for view in views} for name in ATTRIBUTES}
    chances: dict[str, list[float]] = {name: [] for name in ATTRIBUTES}
    for i, caption in enumerate(scenes.captions):
        for name, others in variants(caption).items():
            texts = torch.stack([feature(each) for each in (caption, *others)])
            chances[name].append(1 / len(texts))
            for view, pictures in views.items():
                right[name][view].append(_nearest(pictures[i], texts) == 0)
    rows = []
    for name, found in right.items():
        row: dict[str, Any] = {
            "attribute": name,
            "scenes": len(chances[name]),
            "by chance": round(np.mean(chances[name]), 2),
        }
        for view, hits in found.items():
            mean, error = mean_and_error(np.array(hits, float))
            row |= {view: round(mean, 3), f"{view} se": round(error, 3)}
        rows.append(row)
    return rows


def _nearest(picture: Tensor, texts: Tensor) -> int:
    return int(torch.cosine_similarity(picture[None], texts).argmax())
