"""Attributes of the demo world: each makes a scene and the same scene with the other value, so that what an edit should do,
and should leave, is known to the pixel."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ...demo.render import render
from ...demo.world import COLOURS, Figure, Identity, Scene, Solid, sample_figure, sample_scene

MARGIN_PX = 4
ARM = ((-0.35, -0.1), (0.35, 0.1))
LEGS = (-0.2, 0.1, 0.2, -0.1)
ARM_UP = (-2.4, -0.2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attribute:
    """make(rng, value): a scene that has it or not, all else the same for the same rng. space: where its boundary is fitted.
    worded: whether captions tell it."""

    name: str
    make: Callable[[np.random.Generator, bool], Scene]
    space: str = "z"
    worded: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """A scene, and what it would be with the other value; value is the scene's own."""

    value: bool
    scene: Scene
    other: Scene

    def pictures(self) -> tuple[Tensor, Tensor]:
        """Both, (128, 128, 3) in 0..1."""
        own, other = (torch.from_numpy(render(scene).image / np.float32(255)) for scene in (self.scene, self.other))
        return own, other


def sample_pairs(attribute: Attribute, count: int, seed: int) -> list[Pair]:
    """Of both values in turn."""
    pairs = []
    for number in range(count):
        value = number % 2 == 0
        scene, other = (attribute.make(np.random.default_rng([seed, number]), v) for v in (value, not value))
        pairs.append(Pair(value=value, scene=scene, other=other))
    return pairs


def where_they_differ(own: Tensor, other: Tensor, margin_px: int = 0) -> Tensor:
    """(H, W), 1 where two pictures (H, W, 3) differ, widened by a margin."""
    region = ((own - other).abs().amax(-1) > 0.02).float()
    if not margin_px:
        return region
    return F.max_pool2d(region[None, None], 2 * margin_px + 1, stride=1, padding=margin_px)[0, 0]


def is_flipped(picture: Tensor, pair: Pair) -> bool:
    """Whether a finished picture is nearer to the scene of the other value than to its own, where these differ."""
    own, other = pair.pictures()
    region = where_they_differ(own, other)[..., None]
    return float(((picture - other).abs() * region).sum()) < float(((picture - own).abs() * region).sum())


def change_elsewhere(picture: Tensor, untouched: Tensor, pair: Pair) -> float:
    """Mean difference of pixels, 0..1, from the picture's own way back, outside of what the other value changes."""
    outside = 1 - where_they_differ(*pair.pictures(), MARGIN_PX)
    return float(((picture - untouched).abs().mean(-1) * outside).sum() / outside.sum())


def _wall(rng: np.random.Generator, value: bool) -> Scene:
    walls = ("cream", "pink") if value else ("grey", "teal")
    return sample_scene(rng, figure_only=True, wall=walls[0 if rng.random() < 0.5 else 1])


def _standing(
    rng: np.random.Generator, *, colour: str | None = None, shirt: str | None = None, x: float = 0.5, base_y: float = 0.93,
    arm_up: bool = False, solids: tuple[Solid, ...] = (),
) -> Scene:  # fmt: skip
    """An upright figure, one size, arms hanging: as faces are in their data sets."""
    names = [name for name in COLOURS if name not in ("red", "blue")]
    drawn = [str(name) for name in rng.permutation(names)[:2]]
    jitter = rng.normal(0, 0.06, 9)
    right = ARM_UP if arm_up else ARM[0]
    pose = tuple(float(v) for v in np.array([0.0, *right, *ARM[1], *LEGS]) + jitter)
    identity = Identity(colour=colour or drawn[0], shirt=shirt or drawn[1], thickness=0.06)
    figure = Figure(identity=identity, x=x, base_y=base_y, pose=pose)
    return Scene(figure=figure, solids=solids, wall=str(rng.choice(["grey", "cream", "pink", "teal"])))


def _anywhere(rng: np.random.Generator, *, colour: str | None = None, shirt: str | None = None) -> Scene:
    figure = sample_figure(rng)
    names = [name for name in COLOURS if name not in ("red", "blue")]
    identity = Identity(
        colour=colour or str(rng.choice(names)), shirt=shirt or str(rng.choice(names)), thickness=figure.identity.thickness
    )
    wall = str(rng.choice(["grey", "cream", "pink", "teal"]))
    return Scene(figure=dataclasses.replace(figure, identity=identity), solids=(), wall=wall)


def _colour(value: bool) -> str:
    return "red" if value else "blue"


def _ball(value: bool) -> tuple[Solid, ...]:
    return (Solid(shape="ball", colour="red", x=0.8, base_y=0.9, size=0.13),) if value else ()


ATTRIBUTES = (
    Attribute(name="bright wall", make=_wall, worded=True),
    Attribute(name="red shirt, in one place", make=lambda rng, value: _standing(rng, shirt=_colour(value))),
    Attribute(name="red figure, in one place", make=lambda rng, value: _standing(rng, colour=_colour(value)), worded=True),
    Attribute(
        name="red shirt, anywhere", space="region", make=lambda rng, value: _anywhere(rng, shirt=_colour(value)),
    ),
    Attribute(
        name="red figure, anywhere", space="region", worded=True,
        make=lambda rng, value: _anywhere(rng, colour=_colour(value)),
    ),
    Attribute(name="arm up, in one place", make=lambda rng, value: _standing(rng, arm_up=value)),
    Attribute(name="on the left", make=lambda rng, value: _standing(rng, x=0.3 if value else 0.7)),
    Attribute(name="near", make=lambda rng, value: _standing(rng, base_y=0.96 if value else 0.82)),
    Attribute(
        name="a ball is there", make=lambda rng, value: _standing(rng, x=0.4, solids=_ball(value)), worded=True
    ),
)  # fmt: skip
