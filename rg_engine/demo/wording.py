"""Captions of the demo world taken apart, and others that differ in one attribute."""

from __future__ import annotations

import dataclasses
import functools
import re

from .world import COLOURS, SOLIDS, WALLS

ATTRIBUTES = (
    "figure's colour", "solid's colour", "solid's shape", "wall", "colours swapped", "sides swapped", "a thing missing",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wording:
    """things: (colour, noun) in a caption's order: the figure, then solids from left to right."""

    things: tuple[tuple[str, str], ...]
    wall: str

    def __str__(self) -> str:
        return " and ".join(f"a {colour} {noun}" for colour, noun in self.things) + f", {self.wall} wall"

    def replaced(self, place: int, thing: tuple[str, str]) -> Wording:
        things = (*self.things[:place], thing, *self.things[place + 1 :])
        return dataclasses.replace(self, things=things)


def read_caption(caption: str) -> Wording:
    """Of a caption as :meth:`Scene.caption` writes them."""
    *things, (wall, _) = re.findall(r"(\w+) (figure|ball|box|cone|wall)", caption)
    return Wording(things=tuple(things), wall=wall)


@functools.cache
def variants(caption: str) -> dict[str, tuple[str, ...]]:
    """By attribute, all captions that differ from this one in it alone; only attributes that it has."""
    own = read_caption(caption)
    found: dict[str, list[Wording]] = {name: [] for name in ATTRIBUTES}
    for place, (colour, noun) in enumerate(own.things):
        recoloured = [own.replaced(place, (other, noun)) for other in COLOURS if other != colour]
        found["figure's colour" if noun == "figure" else "solid's colour"] += recoloured
        if noun != "figure":
            found["solid's shape"] += [own.replaced(place, (colour, other)) for other in SOLIDS if other != noun]
        if len(own.things) > 1:
            found["a thing missing"].append(dataclasses.replace(own, things=own.things[:place] + own.things[place + 1 :]))
        for later in range(place + 1, len(own.things)):
            (other_colour, other_noun), both_solids = own.things[later], noun != "figure"
            swapped = own.replaced(place, (other_colour, noun)).replaced(later, (colour, other_noun))
            found["colours swapped"] += [swapped] if colour != other_colour else []
            if both_solids:
                found["sides swapped"].append(own.replaced(place, own.things[later]).replaced(later, (colour, noun)))
    found["wall"] = [dataclasses.replace(own, wall=other) for other in WALLS if other != own.wall]
    others = {name: tuple(dict.fromkeys(map(str, each))) for name, each in found.items()}
    return {name: kept for name, each in others.items() if (kept := tuple(o for o in each if o != caption))}
