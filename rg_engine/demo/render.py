"""Draws a scene of the demo world, with its ground truths: depth, edges, pose, parts, correspondences."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from .world import BONES, COLOURS, HORIZON, JOINTS, SUBJECT_COLOURS, WALL_BASE, WALLS, Figure, Scene, Solid, disparity

#: Colours of the bones in a pose picture (one a bone) and of the discs on its joints.
BONE_COLOURS = tuple(
    tuple(int(255 * c) for c in np.clip(np.abs((np.array([0, 4, 2]) + 6 * i / len(BONES)) % 6 - 3) - 1, 0, 1))
    for i in range(len(BONES))
)
FIGURE_COLOURS = {**COLOURS, **SUBJECT_COLOURS}
FIGURE_PART = 1  # parts 1.. are the bones of the figure (plus one for the head), then one part a solid
SUPERSAMPLING = 3
DRAWN_BONES = tuple(i for i, bone in enumerate(BONES) if bone != (0, 1))  # the neck is hidden


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rendering:
    """A picture of a scene and what is true about it, all of one size.

    image (H, W, 3) uint8; depth (H, W) float32, disparity in 0..1, near is 1; parts (H, W) uint8, 0 the room,
    1..13 the figure's bones in BONES' order (the neck is hidden by its neighbours), 14 its head, 15.. the solids.
    """

    image: np.ndarray
    depth: np.ndarray
    parts: np.ndarray

    @property
    def figure_mask(self) -> np.ndarray:
        return (self.parts >= FIGURE_PART) & (self.parts <= FIGURE_PART + len(BONES))


def render(scene: Scene, size_px: int = 128) -> Rendering:
    """Draw ``scene`` into a square of ``size_px``."""
    n = size_px * SUPERSAMPLING
    canvas = _Canvas(n)
    _draw_room(canvas, scene.wall)
    items: list[tuple[float, Solid | Figure, int]] = [
        (solid.base_y, solid, FIGURE_PART + len(BONES) + 1 + i) for i, solid in enumerate(scene.solids)
    ]
    if scene.figure is not None:
        items.append((scene.figure.base_y, scene.figure, FIGURE_PART))
    items.sort(key=lambda item: item[0])  # far ones first
    for _, item, _ in items:
        _draw_shadow(canvas, item)
    for _, item, part in items:
        if isinstance(item, Figure):
            _draw_figure(canvas, item, part)
        else:
            _draw_solid(canvas, item, part)
    small = (size_px, size_px)
    centre = SUPERSAMPLING // 2
    return Rendering(
        image=np.asarray(canvas.image.resize(small, Image.Resampling.BOX)),
        depth=np.asarray(canvas.depth.resize(small, Image.Resampling.BOX), dtype=np.float32),
        parts=np.asarray(canvas.parts)[centre::SUPERSAMPLING, centre::SUPERSAMPLING].copy(),
    )


def edge_map(image: np.ndarray) -> np.ndarray:
    """Edge strength of a picture: the Sobel gradient's length, its largest over the colours.

    Args: image (H, W, 3), uint8 or 0..1. Returns (H, W) float32 in 0..1; a step of half the range gives 1.
    """
    rgb = image.astype(np.float32) / (255.0 if image.dtype == np.uint8 else 1.0)
    p = np.pad(rgb, ((1, 1), (1, 1), (0, 0)), mode="edge")
    dx = p[:, 2:] - p[:, :-2]
    dx = dx[:-2] + 2 * dx[1:-1] + dx[2:]
    dy = p[2:] - p[:-2]
    dy = dy[:, :-2] + 2 * dy[:, 1:-1] + dy[:, 2:]
    return np.clip(np.sqrt(dx**2 + dy**2).max(-1) / 2.0, 0, 1)


def pose_map(figure: Figure | np.ndarray | None, size_px: int = 128) -> np.ndarray:
    """The pose as a picture: coloured bones on black, (H, W, 3) uint8. ``figure`` may be its joints, (14, 2)."""
    n = size_px * SUPERSAMPLING
    image = Image.new("RGB", (n, n))
    if figure is not None:
        joints = (figure.joints() if isinstance(figure, Figure) else np.asarray(figure)) * n
        draw = ImageDraw.Draw(image)
        width = max(1, round(0.028 * n))
        for (a, b), colour in zip(BONES, BONE_COLOURS, strict=True):
            _capsule(draw, joints[a], joints[b], width / 2, colour)
        for x, y in joints:
            r = 0.7 * width
            draw.ellipse((x - r, y - r, x + r, y + r), fill=(255, 255, 255))
    return np.asarray(image.resize((size_px, size_px), Image.Resampling.BOX))


def joint_heatmaps(figure: Figure | None, size_px: int, spread: float = 0.03) -> np.ndarray:
    """One Gaussian a joint, (14, H, W) float32 in 0..1; ``spread`` is its sigma as a fraction of the picture."""
    if figure is None:
        return np.zeros((len(JOINTS), size_px, size_px), np.float32)
    grid = (np.arange(size_px) + 0.5) / size_px
    joints = figure.joints()
    gx = np.exp(-((grid[None] - joints[:, :1]) ** 2) / (2 * spread**2))  # (14, W)
    gy = np.exp(-((grid[None] - joints[:, 1:]) ** 2) / (2 * spread**2))  # (14, H)
    return (gy[:, :, None] * gx[:, None, :]).astype(np.float32)


def correspondences(
    a: Figure, b: Figure, parts_a: np.ndarray, parts_b: np.ndarray, count: int, rng: np.random.Generator
) -> np.ndarray:
    """Points of one figure seen in two pictures, (n, 2, 2): [point, picture, (x, y)] as fractions, n <= count.

    A point is fixed to a bone (how far along it, how far beside it) and kept where that bone is visible in both.
    """
    joints = a.joints(), b.joints()
    radii = _bone_radius(a), _bone_radius(b)
    size_px = parts_a.shape[0]
    found: list[np.ndarray] = []
    for _ in range(8 * count):
        if len(found) == count:
            break
        bone = int(rng.choice(DRAWN_BONES))
        along, beside = rng.uniform(0, 1), rng.uniform(-0.8, 0.8)
        pair = np.empty((2, 2))
        for k in range(2):
            start, end = joints[k][BONES[bone][0]], joints[k][BONES[bone][1]]
            axis = (end - start) / max(float(np.linalg.norm(end - start)), 1e-6)
            pair[k] = start + along * (end - start) + beside * radii[k] * np.array([-axis[1], axis[0]])
        cells = np.floor(pair * size_px).astype(int)
        if cells.min() < 0 or cells.max() >= size_px:
            continue
        seen = (parts_a[cells[0, 1], cells[0, 0]], parts_b[cells[1, 1], cells[1, 0]])
        if seen == (FIGURE_PART + bone, FIGURE_PART + bone):
            found.append(pair)
    return np.array(found).reshape(-1, 2, 2)


def scene_tracks(
    a: Scene, b: Scene, parts_a: np.ndarray, parts_b: np.ndarray, count: int, rng: np.random.Generator
) -> np.ndarray:
    """Points of two scenes with the same things elsewhere, (n, 2, 2) as :func:`correspondences`, n <= count.

    About half lie on the figure, the rest on solids and on the room, which stays where it is.
    """
    size_px = parts_a.shape[0]
    found: list[np.ndarray] = []
    if a.figure is not None and b.figure is not None:
        found += list(correspondences(a.figure, b.figure, parts_a, parts_b, (count + 1) // 2, rng))
    for _ in range(8 * count):
        if len(found) >= count:
            break
        number = int(rng.integers(-1, len(a.solids)))  # -1 is the room
        part = 0 if number < 0 else FIGURE_PART + len(BONES) + 1 + number
        rows, columns = np.nonzero(parts_a == part)
        if not len(rows):
            continue
        k = int(rng.integers(len(rows)))
        point = (np.array([columns[k], rows[k]]) + 0.5) / size_px
        other = point
        if number >= 0:
            here, there = a.solids[number], b.solids[number]
            offset = (point - [here.x, here.base_y]) / (here.size * disparity(here.base_y))
            other = np.array([there.x, there.base_y]) + offset * (there.size * disparity(there.base_y))
        cell = np.floor(other * size_px).astype(int)
        if cell.min() >= 0 and cell.max() < size_px and parts_b[cell[1], cell[0]] == part:
            found.append(np.stack([point, other]))
    return np.array(found).reshape(-1, 2, 2)


class _Canvas:
    """Three pictures of one size that are drawn together: colours, disparity and part numbers."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.image = Image.new("RGB", (n, n))
        self.depth = Image.new("F", (n, n))
        self.parts = Image.new("L", (n, n))
        self.pens = tuple(ImageDraw.Draw(layer) for layer in (self.image, self.depth, self.parts))

    def _layers(self, colour: tuple[int, ...], depth: float, part: int) -> list[tuple[ImageDraw.ImageDraw, Any]]:
        return list(zip(self.pens, (colour, depth, part), strict=True))

    def polygon(self, points: np.ndarray, colour: tuple[int, ...], depth: float, part: int) -> None:
        flat = [tuple(p) for p in points * self.n]
        for pen, fill in self._layers(colour, depth, part):
            pen.polygon(flat, fill=fill)

    def ellipse(self, x: float, y: float, rx: float, ry: float, colour: tuple[int, ...], depth: float, part: int) -> None:
        box = tuple(self.n * v for v in (x - rx, y - ry, x + rx, y + ry))
        for pen, fill in self._layers(colour, depth, part):
            pen.ellipse(box, fill=fill)

    def capsule(self, a: np.ndarray, b: np.ndarray, radius: float, colour: tuple, depth: float, part: int) -> None:
        for pen, fill in self._layers(colour, depth, part):
            _capsule(pen, a * self.n, b * self.n, radius * self.n, fill)


def _capsule(pen: ImageDraw.ImageDraw, a: np.ndarray, b: np.ndarray, radius: float, fill: Any) -> None:
    pen.line((*a, *b), fill=fill, width=max(1, round(2 * radius)))
    for x, y in (a, b):
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)


def _shade(colour: tuple[int, ...], factor: float) -> tuple[int, ...]:
    """Darker below 1; above 1 mixed with white."""
    if factor <= 1:
        return tuple(round(c * factor) for c in colour)
    return tuple(round(c + (255 - c) * (factor - 1)) for c in colour)


def _bone_radius(figure: Figure) -> float:
    return 0.5 * figure.identity.thickness * disparity(figure.base_y) * 1.18


def _draw_room(canvas: _Canvas, wall: str) -> None:
    n = canvas.n
    rows = (np.arange(n) + 0.5) / n
    floor = rows >= WALL_BASE
    depth = np.where(floor, (rows - HORIZON) / (1 - HORIZON), disparity(WALL_BASE)).astype(np.float32)
    light = np.where(floor, 0.62 + 0.25 * (rows - WALL_BASE) / (1 - WALL_BASE), 1.0)
    colours = np.clip(np.array(WALLS[wall])[None] * light[:, None], 0, 255).astype(np.uint8)  # (n, 3)
    canvas.image.paste(Image.fromarray(np.repeat(colours[:, None], n, axis=1)))
    canvas.depth.paste(Image.fromarray(np.repeat(depth[:, None], n, axis=1)))


def _draw_shadow(canvas: _Canvas, item: Solid | Figure) -> None:
    half = (0.1 if isinstance(item, Figure) else item.size) * disparity(item.base_y)
    x, y, n = item.x * canvas.n, item.base_y * canvas.n, canvas.n
    box = (round(x - 1.2 * half * n), round(y - 0.3 * half * n), round(x + 1.2 * half * n), round(y + 0.35 * half * n))
    mask = Image.new("L", (n, n))
    ImageDraw.Draw(mask).ellipse(box, fill=90)
    canvas.image.paste((30, 30, 36), mask=mask)


def _draw_solid(canvas: _Canvas, solid: Solid, part: int) -> None:
    near = disparity(solid.base_y)
    half, colour = solid.size * near, COLOURS[solid.colour]
    x, y = solid.x, solid.base_y
    if solid.shape == "ball":
        for k in range(12):  # concentric discs towards the light: shading and a bulge towards the viewer
            shrink = 1 - k / 12
            at_x, at_y = x - 0.3 * half * (1 - shrink), y - half - 0.35 * half * (1 - shrink)
            canvas.ellipse(at_x, at_y, half * shrink, half * shrink, _shade(colour, 0.7 + 0.045 * k), near + 0.005 * k, part)
    elif solid.shape == "box":
        lid = 0.45 * half
        front = np.array([[x - half, y], [x + half, y], [x + half, y - 1.6 * half], [x - half, y - 1.6 * half]])
        top = np.array([[x - half, y - 1.6 * half], [x + half, y - 1.6 * half],
                        [x + 0.75 * half, y - 1.6 * half - lid], [x - 0.75 * half, y - 1.6 * half - lid]])  # fmt: skip
        canvas.polygon(top, _shade(colour, 1.35), near - 0.03, part)
        canvas.polygon(front, _shade(colour, 0.85), near, part)
    else:
        tip = np.array([x, y - 2.3 * half])
        base = [[x + half * np.cos(a), y - 0.22 * half + 0.25 * half * np.sin(a)] for a in np.linspace(0, np.pi, 13)]
        canvas.polygon(np.array([tip, *base]), _shade(colour, 0.75), near, part)
        canvas.polygon(np.array([tip, *base[7:]]), _shade(colour, 1.1), near, part)


def _draw_figure(canvas: _Canvas, figure: Figure, part: int) -> None:
    near, radius, joints = disparity(figure.base_y), _bone_radius(figure), figure.joints()
    colour, shirt = (FIGURE_COLOURS[name] for name in (figure.identity.colour, figure.identity.shirt))
    torso = joints[[2, 5, 11, 8]]
    for i, (a, b) in enumerate(BONES):
        if (a, b) == (1, 2):  # the shirt lies over the legs and the right arm, under the head and the left arm
            canvas.polygon(torso, shirt, near, part + i)
            canvas.capsule(joints[8], joints[11], radius, shirt, near, part + i)
        right = a in (2, 3, 8, 9)
        left = a in (5, 6, 11, 12)
        if right or left:
            tint = _shade(colour, 0.72 if right else 1.18)
            canvas.capsule(joints[a], joints[b], radius, tint, near - 0.02 if right else near + 0.02, part + i)
        elif 1 in (a, b) and 0 not in (a, b):
            canvas.capsule(joints[a], joints[b], radius, shirt, near, part + i)
    head_radius = 0.058 * near * 1.18
    canvas.ellipse(joints[0, 0], joints[0, 1], head_radius, head_radius, colour, near + 0.01, part + len(BONES))
