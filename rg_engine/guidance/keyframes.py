"""Keyframes: a number, or one for each picture, that changes over the diffusion time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..errors import TargetError

Interpolation = Literal["linear", "hold", "ease"]
INTERPOLATIONS: tuple[Interpolation, ...] = get_args(Interpolation)

EXAMPLE = "0.0: 1.0"
EXAMPLE_OF_PICTURES = "0.5: 1.0, 0.8, 0.2"
#: Colours of the first curves of a drawing; further ones begin again.
COLOURS = ((214, 72, 50), (64, 156, 255), (60, 160, 90), (150, 90, 190), (220, 150, 30), (110, 120, 135))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Keyframes:
    """Multipliers over the diffusion time.

    points: (percent, values), percent 0..1 and rising, as ``start_percent`` counts; values one for all pictures or one for
    each, 0 or more. interpolation: between two points the value goes straight (linear), stays that of the earlier (hold), or
    leaves and arrives slowly (ease: 3 u^2 - 2 u^3 of the way). Before the first and after the last point it stays.
    Raises TargetError for anything else.
    """

    points: tuple[tuple[float, tuple[float, ...]], ...]
    interpolation: Interpolation = "linear"

    def __post_init__(self) -> None:
        if self.interpolation not in INTERPOLATIONS:
            raise TargetError(f"interpolation {self.interpolation!r} is unknown: choose one of {', '.join(INTERPOLATIONS)}")
        if not self.points:
            raise TargetError(f"there are no keyframes: give one at least, such as {EXAMPLE}")
        before = -math.inf
        for number, (percent, values) in enumerate(self.points, 1):
            if not 0 <= percent <= 1:
                raise TargetError(f"keyframe {number} is at {percent:g}: percents are parts of the diffusion time, 0..1")
            if percent <= before:
                raise TargetError(
                    f"keyframe {number} is at {percent:g}, not after the one before it, at {before:g}: put keyframes in "
                    "order, one at each percent"
                )
            before = percent
            if not values or not all(math.isfinite(value) and value >= 0 for value in values):
                given = ", ".join(f"{value:g}" for value in values) or "nothing"
                raise TargetError(f"keyframe {number}, at {percent:g}, is {given}: values must be 0 or more, and finite")
        counts = [len(values) for _, values in self.points]
        if len({*counts} - {1}) > 1:
            raise TargetError(
                f"keyframes have {', '.join(map(str, counts))} values: give each one, or as many as pictures are being made"
            )

    @property
    def pictures(self) -> int:
        """How many pictures it has values for; 1 for any number."""
        return max(len(values) for _, values in self.points)

    def at(self, percent: float, batch: int) -> Tensor:
        """The multipliers of ``batch`` pictures at a part of the diffusion time, (B,) float32."""
        after = next((k for k, (at, _) in enumerate(self.points) if at > percent), len(self.points))
        (start, low), (end, high) = self.points[max(after - 1, 0)], self.points[min(after, len(self.points) - 1)]
        share = (percent - start) / (end - start) if start <= percent < end else 0.0
        if self.interpolation == "hold":
            share = 0.0
        elif self.interpolation == "ease":
            share = share * share * (3 - 2 * share)
        values = torch.lerp(_spread_over(low, batch), _spread_over(high, batch), share)
        return values.float()

    def most(self, percent: float) -> float:
        """The largest multiplier of any picture at a part of the diffusion time."""
        return float(self.at(percent, self.pictures).max())

    def check_batch(self, batch: int) -> None:
        """Raises TargetError unless every keyframe has one value or one for each of ``batch`` pictures."""
        for number, (percent, values) in enumerate(self.points, 1):
            if len(values) not in (1, batch):
                raise TargetError(
                    f"keyframe {number}, at {percent:g}, has {len(values)} values but {batch} "
                    f"{'picture is' if batch == 1 else 'pictures are'} being made: give one value, or one for each"
                )


def parse_keyframes(text: str, interpolation: Interpolation = "linear") -> Keyframes:
    """Keyframes from text: ``percent: value`` or ``percent: value, value, ...`` (one for each picture of a batch) a line.

    ``;`` ends a line too; empty lines and what follows a ``#`` are left out. Raises TargetError, saying which line.
    """
    points = []
    for number, line in enumerate(text.splitlines(), 1):
        for part in line.partition("#")[0].split(";"):
            if part.strip():
                points.append(_point(part.strip(), number))
    if not points:
        raise TargetError(f"keyframes is empty: write one a line, such as {EXAMPLE}")
    return Keyframes(points=tuple(points), interpolation=interpolation)


def spread(values: Iterable[float], interpolation: Interpolation = "linear") -> Keyframes:
    """Keyframes at even distances over the whole diffusion time, for all pictures; a single value holds throughout."""
    given = tuple(float(value) for value in values)
    last = max(len(given) - 1, 1)
    return Keyframes(points=tuple((k / last, (value,)) for k, value in enumerate(given)), interpolation=interpolation)


def numbers(given: Any) -> list[float]:
    """The numbers in a number, a list, lists in a list, a tensor or a series, in order.

    Raises TargetError where there is something else, or nothing.
    """
    if hasattr(given, "tolist"):
        given = given.tolist()
    if isinstance(given, (list, tuple)) and given:
        return [number for item in given for number in numbers(item)]
    if isinstance(given, (int, float)) and not isinstance(given, bool):
        return [float(given)]
    raise TargetError(f"values holds {str(given)[:60]!r}: expected a number or a list of numbers, such as [1.0, 0.5, 0.0]")


def draw_keyframes(keyframes: Keyframes) -> Tensor:
    """The curves, one a picture, with their points, as a picture (1, 400, 720, 3) in 0..1."""
    from ..chart import Chart

    batch = keyframes.pictures
    highest = max(1.0, *(value for _, values in keyframes.points for value in values))
    chart = Chart()
    chart.grid([f"{k / 4:g}" for k in range(5)], [f"{highest * k / 4:.3g}" for k in range(5)])
    places = sorted({k / 200 for k in range(201)} | {p for at, _ in keyframes.points for p in (at, max(at - 1e-6, 0.0))})
    rows = [(keyframes.at(place, batch) / highest).tolist() for place in places]
    for picture in range(batch):
        colour = COLOURS[picture % len(COLOURS)]
        chart.line([(place, row[picture]) for place, row in zip(places, rows, strict=True)], colour, 2)
        for at, values in keyframes.points:
            chart.dot((at, values[picture % len(values)] / highest), colour)
    chart.words(
        f"{len(keyframes.points)} keyframes, {keyframes.interpolation}" + (f", {batch} pictures" if batch > 1 else ""),
        "percent",
    )
    return chart.picture()


def _point(part: str, number: int) -> tuple[float, tuple[float, ...]]:
    at, colon, given = part.partition(":")
    shown = repr(part[:60])
    if not colon:
        raise TargetError(
            f"line {number} of keyframes is {shown}: expected a percent, a colon and a value, such as {EXAMPLE}"
        )
    try:
        percent, values = float(at), tuple(float(value) for value in given.split(","))
    except ValueError as error:
        raise TargetError(
            f"line {number} of keyframes is {shown}: expected numbers, such as {EXAMPLE} or, with a value for each "
            f"picture, {EXAMPLE_OF_PICTURES}"
        ) from error
    try:
        Keyframes(points=((percent, values),))
    except TargetError as error:
        raise TargetError(
            f"line {number} of keyframes is {shown}: expected a percent in 0..1 and values of 0 or more, such as {EXAMPLE}"
        ) from error
    return percent, values


def _spread_over(values: Sequence[float], batch: int) -> Tensor:
    if len(values) not in (1, batch):
        raise TargetError(
            f"keyframes have {len(values)} values but there are {batch} pictures: give one value, or one for each"
        )
    return torch.tensor(values, dtype=torch.float64).expand(batch)
