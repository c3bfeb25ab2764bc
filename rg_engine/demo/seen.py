"""What is to be seen in a finished picture, by its colours: who stands there, what stands beside, before which wall.

A referee of attributes, as :mod:`.estimator` is one of pose and depth, whose joints it takes: no network reads colours or
shapes here, and nothing that steers has a part in it.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .estimator import Estimator, joint_positions
from .wording import Wording
from .world import BONES, COLOURS, WALL_BASE, WALLS

#: Bones in the figure's own colour: its limbs. The others are its shirt's.
LIMBS = tuple(bone for bone in BONES if bone[0] in (2, 3, 5, 6, 8, 9, 11, 12) and bone[1] == bone[0] + 1)
TRUNK = ((2, 5), (8, 11), (2, 8), (5, 11), (2, 11), (5, 8), (1, 0))
SHADES = (0.7, 0.85, 1.0, 1.18, 1.35)
LIMB_PX, FIGURE_PX = 1.5, 8.0  # of bones: surely the limb; nothing but the figure
SMALLEST_PX = 70  # of a thing, pixels
#: How much of its box a thing fills: below the first a cone, above the second a box, between them a ball.
CONE_FILLS, BOX_FILLS = 0.68, 0.86
TWO_THINGS = 0.3  # the share of each colour of a piece that is two things
ROOM = 0.13  # distance from the room's own colour, RGB in 0..1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seen:
    """figure: its colour; things: (colour, noun), largest first; wall."""

    figure: str
    things: tuple[tuple[str, str], ...]
    wall: str

    def has(self, asked: Wording) -> dict[str, float]:
        """How much of each attribute of a caption is there, 0 to 1: of solids the share that is."""
        figures = [colour for colour, noun in asked.things if noun == "figure"]
        solids = [thing for thing in asked.things if thing[1] != "figure"]
        found = {"wall": float(self.wall == asked.wall)}
        if figures:
            found["figure's colour"] = float(self.figure == figures[0])
        if solids:
            colours = [colour for colour, _ in self.things]
            found["solids' colours"] = float(np.mean([colour in colours for colour, _ in solids]))
            found["solids' shapes"] = float(np.mean([thing in self.things for thing in solids]))
        return found


def look(pictures: Tensor, estimator: Estimator) -> list[Seen]:
    """Of pictures (B, H, W, 3) in 0..1."""
    with torch.inference_mode():
        heatmaps, _ = estimator(pictures.permute(0, 3, 1, 2).float() * 2 - 1)
        joints = joint_positions(heatmaps)
    return [_look(picture.float(), places) for picture, places in zip(pictures, joints, strict=True)]


def _look(picture: Tensor, joints: Tensor) -> Seen:
    height, width, _ = picture.shape
    wall = picture[: height // 8].flatten(0, 1).median(0).values
    names = list(WALLS)
    known = torch.tensor([WALLS[name] for name in names]) / 255
    nearest = names[int((known - wall).norm(dim=-1).argmin())]
    colours = _colours(picture)  # (H, W), -1 is the room
    colours[_is_room(picture, wall)] = -1
    places = joints * torch.tensor([width, height])
    on_limbs = _near(places, LIMBS, LIMB_PX, (height, width))
    figure = _near(places, (*LIMBS, *TRUNK), FIGURE_PX, (height, width))
    beside = torch.where(figure, -1, colours)
    things = []
    for mask in (part for piece in _pieces(beside >= 0) for part in _by_colour(piece, beside)):
        rows, columns = torch.nonzero(mask, as_tuple=True)
        box = (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
        fills = len(rows) / float(box)
        noun = "cone" if fills < CONE_FILLS else "ball" if fills < BOX_FILLS else "box"
        things.append((_most(beside[mask]), noun))
    return Seen(figure=_most(colours[on_limbs & (colours >= 0)]), things=tuple(things), wall=nearest)


def _colours(picture: Tensor) -> Tensor:
    """The named colour that each pixel is nearest to, in light or shade, (H, W)."""
    shades = []
    for rgb in COLOURS.values():
        base = torch.tensor(rgb) / 255
        shades.append(torch.stack([base * s if s <= 1 else base + (1 - base) * (s - 1) for s in SHADES]))
    distance = (picture[..., None, None, :] - torch.stack(shades)).norm(dim=-1)  # (H, W, colours, shades)
    return distance.amin(-1).argmin(-1)


def _is_room(picture: Tensor, wall: Tensor) -> Tensor:
    """Wall, floor and shadows, (H, W): the wall's colour in some light, from a shadow's to its own."""
    light = (picture @ wall) / wall.dot(wall)
    darkest = 0.35
    own = (picture - light.clamp(darkest, 1.05)[..., None] * wall).norm(dim=-1) < ROOM
    floor = torch.arange(len(picture))[:, None] >= WALL_BASE * len(picture) - 4
    return own & (floor | (light > 0.9))


def _near(places: Tensor, bones: tuple[tuple[int, int], ...], reach_px: float, size: tuple[int, int]) -> Tensor:
    """Pixels within reach of bones between places (J, 2), (H, W)."""
    y, x = torch.meshgrid(torch.arange(size[0]) + 0.5, torch.arange(size[1]) + 0.5, indexing="ij")
    at = torch.stack([x, y], -1)
    found = torch.zeros(size, dtype=torch.bool)
    for a, b in bones:
        way = places[b] - places[a]
        along = (((at - places[a]) @ way) / way.dot(way).clamp(min=1e-6)).clamp(0, 1)
        found |= (at - places[a] - along[..., None] * way).norm(dim=-1) <= reach_px
    return found


def _pieces(mask: Tensor) -> list[Tensor]:
    """Connected parts of a mask (H, W) of at least SMALLEST_PX, largest first."""
    labels = torch.where(mask, torch.arange(1, mask.numel() + 1).view_as(mask), 0).float()
    while True:
        grown = torch.where(mask, F.max_pool2d(labels[None], 3, stride=1, padding=1)[0], 0)
        if torch.equal(grown, labels):
            break
        labels = grown
    numbers, counts = torch.unique(labels[mask], return_counts=True)
    large = sorted(((int(c), float(n)) for n, c in zip(numbers, counts, strict=True) if c >= SMALLEST_PX), reverse=True)
    return [labels == number for _, number in large]


def _by_colour(piece: Tensor, colours: Tensor) -> list[Tensor]:
    """A piece, or, where two things touch, a part of it for each."""
    counts = torch.bincount(colours[piece], minlength=len(COLOURS))
    large = [n for n in counts.argsort(descending=True).tolist() if counts[n] > TWO_THINGS * counts.sum()]
    parts = [part for n in large for part in _pieces(piece & (colours == n))[:1]]
    return parts if len(parts) > 1 else [piece]


def _most(colours: Tensor) -> str:
    return list(COLOURS)[int(np.bincount(colours.numpy(), minlength=len(COLOURS)).argmax())] if len(colours) else ""
