"""Drags as JSON, as the Drag Points node keeps them in a workflow, and as a picture."""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from torch import Tensor

from ..errors import TargetError
from ..types import Drag
from .pictures import as_image

VERSION = 1
EXAMPLE = '{"version": 1, "drags": [{"from": [0.3, 0.5], "to": [0.6, 0.5]}]}'


def parse_drags(text: str) -> tuple[Drag, ...]:
    """Drags from ``{"version": 1, "drags": [{"from": [x, y], "to": [x, y]}, ...]}``; an empty text has none.

    Raises TargetError, saying where, for anything malformed or outside the picture.
    """
    if not text.strip():
        return ()
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise TargetError(f"points is not JSON (line {error.lineno}, column {error.colno}): expected {EXAMPLE}") from error
    except (ValueError, RecursionError) as error:  # numbers too long, lists too deep
        raise TargetError(f"points is not JSON that can be read: expected {EXAMPLE}") from error
    if not isinstance(value, dict) or not isinstance(value.get("drags"), list):
        raise TargetError(f"points has no list of drags: expected {EXAMPLE}")
    if value.get("version") != VERSION or value["version"] is True:
        raise TargetError(f"points has version {value.get('version')!r}: this extension reads version {VERSION}. Update it")
    return tuple(_drag(item, number) for number, item in enumerate(value["drags"], 1))


def _drag(item: Any, number: int) -> Drag:
    if not isinstance(item, dict) or not {"from", "to"} <= set(item):
        raise TargetError(f"drag {number} needs a 'from' and a 'to': expected {EXAMPLE}")
    ends = []
    for key in ("from", "to"):
        point = item[key]
        numbers = isinstance(point, list) and len(point) == 2
        if not numbers or any(isinstance(v, bool) or not isinstance(v, (int, float)) for v in point):
            raise TargetError(f"'{key}' of drag {number} is {json.dumps(point)[:60]}: expected two numbers, [x, y]")
        ends.append(point)
    try:
        start, end = ((float(x), float(y)) for x, y in ends)
        return Drag(start, end)
    except (TargetError, OverflowError) as error:
        raise TargetError(f"drag {number}: {error}") from error


def draw_drags(drags: tuple[Drag, ...], picture: Tensor) -> Tensor:
    """The drags as arrows over pictures (B, H, W, 3) in 0..1: a ring where each starts, a head where it ends."""
    import numpy as np
    from PIL import ImageDraw

    height, width = picture.shape[1:3]
    unit = max(2.0, min(height, width) / 64)
    out = []
    for frame in picture:
        image = as_image(frame[..., :3])
        pen = ImageDraw.Draw(image)
        for drag in drags:
            (x0, y0), (x1, y1) = ((x * width, y * height) for x, y in (drag.start, drag.end))
            angle = math.atan2(y1 - y0, x1 - x0)
            for thickness, colour in ((unit + 2, (0, 0, 0)), (unit, (255, 255, 255))):
                pen.line((x0, y0, x1, y1), fill=colour, width=max(1, round(thickness)))
            pen.ellipse(
                (x0 - 1.6 * unit, y0 - 1.6 * unit, x0 + 1.6 * unit, y0 + 1.6 * unit), outline=(0, 0, 0), fill=(64, 156, 255)
            )
            if (x0, y0) != (x1, y1):
                wings = [(x1 - 4 * unit * math.cos(angle + s), y1 - 4 * unit * math.sin(angle + s)) for s in (0.5, -0.5)]
                pen.polygon([(x1, y1), *wings], fill=(255, 92, 92), outline=(0, 0, 0))
        out.append(torch.from_numpy(np.asarray(image, dtype=np.float32) / 255))
    return torch.stack(out)
