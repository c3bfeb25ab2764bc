"""Control errors on finished pixels: how far a picture is from the scene that it should follow.

Pose and depth are estimated by a network that sees pictures only (:mod:`.estimator`), edges by the Sobel operator. None
of the heads that steer is used.
"""

from __future__ import annotations

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from . import ESTIMATOR
from .estimator import Estimator, joint_positions
from .render import edge_map, render
from .world import Scene

#: What a control error is measured in.
UNITS = {"pose": "px, mean distance of 14 joints", "depth": "mean absolute disparity, 0..1",
         "edges": "px, symmetric chamfer distance"}  # fmt: skip
EDGE_THRESHOLD = 0.25


def load_estimator() -> Estimator:
    net = Estimator()
    net.load_state_dict({key: value.float() for key, value in load_file(ESTIMATOR).items()})
    return net.eval().requires_grad_(False)


def control_errors(control: str, pictures: Tensor, scenes: list[Scene], estimator: Estimator) -> np.ndarray:
    """The error of each picture against its scene, (B,), in UNITS[control]. pictures (B, H, W, 3) in 0..1."""
    if control == "edges":
        return np.array(
            [chamfer_px(edge_map(p.numpy()), edge_map(render(s).image)) for p, s in zip(pictures, scenes, strict=True)]
        )
    with torch.inference_mode():
        heatmaps, disparity = estimator(pictures.permute(0, 3, 1, 2).float() * 2 - 1)
    if control == "pose":
        wanted = torch.tensor(np.stack([s.figure.joints() for s in scenes if s.figure is not None]), dtype=torch.float32)
        return ((joint_positions(heatmaps) - wanted).norm(dim=-1).mean(1) * pictures.shape[1]).numpy()
    truth = torch.tensor(np.stack([render(s).depth[::2, ::2] for s in scenes]))
    return (disparity - truth).abs().flatten(1).mean(1).numpy()


def chamfer_px(a: np.ndarray, b: np.ndarray) -> float:
    """Mean distance from each edge pixel of one map to the nearest of the other, both ways, in pixels."""
    points = [torch.tensor(np.argwhere(m > EDGE_THRESHOLD), dtype=torch.float32) for m in (a, b)]
    if not len(points[0]) or not len(points[1]):
        return float(max(a.shape))
    distances = torch.cdist(points[0], points[1])
    return float((distances.amin(1).mean() + distances.amin(0).mean()) / 2)


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Mean and its standard error."""
    return float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else 0.0
