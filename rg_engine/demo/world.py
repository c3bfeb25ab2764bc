"""The demo world: scenes of one jointed figure and a few solids on a floor before a wall.

A scene is plain data; :mod:`rg_engine.demo.render` draws it and gives its exact ground truths. Everything is procedural,
so that pictures, captions, pose, depth, edges, correspondences and identities cost nothing and are never in doubt.

Coordinates are fractions of the picture, x to the right, y down. The camera is fixed: a point of the floor seen at
height ``y`` has disparity ``(y - HORIZON) / (1 - HORIZON)`` (1 at the lower edge, the inverse of its distance), and what
stands there is scaled by it.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

HORIZON = 0.5
WALL_BASE = 0.62

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (208, 44, 44),
    "orange": (236, 136, 38),
    "yellow": (240, 210, 60),
    "green": (54, 160, 70),
    "blue": (48, 92, 205),
    "purple": (138, 66, 172),
    "white": (242, 242, 238),
}
WALLS: dict[str, tuple[int, int, int]] = {
    "grey": (168, 170, 172),
    "cream": (226, 212, 178),
    "pink": (224, 178, 184),
    "teal": (120, 178, 176),
}
SOLIDS = ("ball", "box", "cone")

JOINTS = (
    "head", "neck",
    "right shoulder", "right elbow", "right wrist",
    "left shoulder", "left elbow", "left wrist",
    "right hip", "right knee", "right ankle",
    "left hip", "left knee", "left ankle",
)  # fmt: skip
#: Pairs of indices into JOINTS, in the order in which they are drawn (back to front).
BONES = (
    (8, 9), (9, 10), (11, 12), (12, 13),
    (2, 3), (3, 4), (1, 2), (1, 5), (1, 8), (1, 11), (0, 1),
    (5, 6), (6, 7),
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Solid:
    """A ball, box or cone standing on the floor at ``(x, base_y)``; ``size`` is its half width at disparity 1."""

    shape: str
    colour: str
    x: float
    base_y: float
    size: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Identity:
    """What makes two figures the same one: the colour that the caption names and the shirt that it doesn't."""

    colour: str
    shirt: str
    thickness: float


#: A figure that no scene of the world has, to teach a model by an adapter: its colours, under words that captions have for
#: walls only.
SUBJECT = Identity(colour="teal", shirt="pink", thickness=0.059)
SUBJECT_COLOURS: dict[str, tuple[int, int, int]] = {"teal": (34, 34, 40), "pink": (232, 36, 168)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure:
    """A jointed figure. ``pose`` holds bone angles in radians, 0 hanging down, positive counter-clockwise on screen."""

    identity: Identity
    x: float
    base_y: float
    pose: tuple[float, ...]  # lean, then (upper, lower) of right arm, left arm, right leg, left leg

    def joints(self) -> np.ndarray:
        """Joint positions, (14, 2) of (x, y) as fractions of the picture, in the order of JOINTS."""
        scale = disparity(self.base_y)
        lean, *limbs = self.pose
        place = np.zeros((len(JOINTS), 2))
        up = np.array([math.sin(lean), -math.cos(lean)])
        side = np.array([math.cos(lean), math.sin(lean)])
        place[1] = 0.27 * up  # the hips' middle is the origin
        place[0] = place[1] + 0.105 * up
        for shoulder, hip, sign in ((2, 8, -1.0), (5, 11, 1.0)):
            place[shoulder] = place[1] - 0.025 * up + sign * 0.075 * side
            place[hip] = sign * 0.05 * side
        for first, length, (upper, lower) in (
            (2, 0.145, limbs[0:2]), (5, 0.145, limbs[2:4]), (8, 0.18, limbs[4:6]), (11, 0.18, limbs[6:8]),
        ):  # fmt: skip
            place[first + 1] = place[first] + length * np.array([math.sin(upper), math.cos(upper)])
            place[first + 2] = place[first + 1] + length * np.array([math.sin(upper + lower), math.cos(upper + lower)])
        place *= scale * 1.18
        lowest = max(place[10, 1], place[13, 1])
        return place + np.array([self.x, self.base_y - lowest])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scene:
    figure: Figure | None
    solids: tuple[Solid, ...]
    wall: str

    def caption(self) -> str:
        things = []
        if self.figure is not None:
            things.append(f"a {self.figure.identity.colour} figure")
        things += [f"a {solid.colour} {solid.shape}" for solid in sorted(self.solids, key=lambda s: s.x)]
        return " and ".join(things) + f", {self.wall} wall"


def disparity(base_y: float) -> float:
    """Inverse distance (0..1, 1 at the picture's lower edge) of the floor seen at height ``base_y``."""
    return (base_y - HORIZON) / (1.0 - HORIZON)


def sample_identity(rng: np.random.Generator, colour: str | None = None) -> Identity:
    colour = colour or str(rng.choice(list(COLOURS)))
    shirt = str(rng.choice([name for name in COLOURS if name != colour]))
    return Identity(colour=colour, shirt=shirt, thickness=float(rng.uniform(0.052, 0.066)))


def sample_figure(rng: np.random.Generator, identity: Identity | None = None) -> Figure:
    """A figure in a random, plausible pose whose joints lie inside the picture."""
    identity = identity or sample_identity(rng)
    while True:
        arms = [(rng.uniform(-2.7, 0.3), rng.uniform(-1.5, 0.9)), (rng.uniform(-0.3, 2.7), rng.uniform(-0.9, 1.5))]
        legs = [(rng.uniform(-0.75, 0.15), rng.uniform(-0.1, 0.7)), (rng.uniform(-0.15, 0.75), rng.uniform(-0.7, 0.1))]
        pose = (float(rng.uniform(-0.2, 0.2)), *(float(angle) for limb in (*arms, *legs) for angle in limb))
        figure = Figure(identity=identity, x=float(rng.uniform(0.22, 0.78)), base_y=float(rng.uniform(0.8, 0.97)), pose=pose)
        joints = figure.joints()
        if joints.min() > 0.05 and joints.max() < 0.98:
            return figure


def sample_elsewhere(rng: np.random.Generator, scene: Scene, identity: Identity | None = None) -> Scene:
    """The same figure (or one of another ``identity``) in another pose, and the same solids, elsewhere before the same
    wall."""
    assert scene.figure is not None
    figure = sample_figure(rng, identity or scene.figure.identity)
    solids: list[Solid] = []
    taken = [(figure.x, 0.16)]
    for solid in scene.solids:
        for attempt in range(200):
            base_y, x = float(rng.uniform(0.74, 0.96)), float(rng.uniform(0.12, 0.88))
            half = solid.size * disparity(base_y)
            if attempt == 199 or all(abs(x - other) > half + reach for other, reach in taken):
                break
        taken.append((x, half))
        solids.append(dataclasses.replace(solid, x=x, base_y=base_y))
    return Scene(figure=figure, solids=tuple(solids), wall=scene.wall)


def sample_other_identity(rng: np.random.Generator, identity: Identity) -> Identity:
    """Another one: of another colour, another shirt or both."""
    while True:
        other = sample_identity(rng, identity.colour if rng.random() < 0.3 else None)
        if (other.colour, other.shirt) != (identity.colour, identity.shirt):
            return other


def sample_scene(
    rng: np.random.Generator, identity: Identity | None = None, figure_only: bool = False, wall: str | None = None
) -> Scene:
    """A random scene; ``identity`` fixes who stands in it."""
    figure = None
    if identity is not None or figure_only or rng.random() < 0.88:
        figure = sample_figure(rng, identity)
    count = 0 if figure_only else int(rng.choice([0, 1, 2], p=[0.4, 0.45, 0.15]))
    if figure is None:
        count = max(count, 1)
    solids: list[Solid] = []
    taken = [] if figure is None else [(figure.x, 0.16)]
    for _ in range(50 * count):
        if len(solids) == count:
            break
        base_y, size = float(rng.uniform(0.74, 0.96)), float(rng.uniform(0.1, 0.15))
        x, half = float(rng.uniform(0.12, 0.88)), size * disparity(base_y)
        if all(abs(x - other) > half + reach for other, reach in taken):
            taken.append((x, half))
            solids.append(
                Solid(shape=str(rng.choice(SOLIDS)), colour=str(rng.choice(list(COLOURS))), x=x, base_y=base_y, size=size)
            )
    if figure is None and not solids:
        return sample_scene(rng, identity, figure_only, wall)
    return Scene(figure=figure, solids=tuple(solids), wall=wall or str(rng.choice(list(WALLS))))
