"""What the Load OFT node does: a file, or an adapter that was trained or extracted, onto a model."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

from ...adapters import Adapter, ReadOptions, load_adapter
from ...errors import AdapterError
from .apply import apply, fit
from .control import control_net
from .folders import NONE, find_adapter
from .report import describe

log = logging.getLogger("readout_guidance")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Loaded:
    """Clones with the adapter on them; control: the file's CONTROL_NET, None if it has no hint network."""

    model: Any
    clip: Any
    oft: Adapter
    report: str
    control: Any


def load_oft(
    model: Any, clip: Any, file: str, oft: Adapter | None, *, strength: float, clip_strength: float, options: ReadOptions,
    orthogonal: bool,
) -> Loaded:  # fmt: skip
    """Everything is read and fitted before anything is changed. Raises AdapterError."""
    if (oft is None) == (file == NONE):
        raise AdapterError(
            "choose a file, or connect oft (from Train OFT or Extract OFT)"
            if oft is None
            else "oft is connected: set file to none"
        )
    adapter = load_adapter(find_adapter(file), options, file) if oft is None else oft
    if orthogonal:
        adapter = always_orthogonal(adapter)
    found = fit(adapter, model, clip)
    report = describe(file if oft is None else adapter.layout, adapter, found, model, strength)
    control = control_net(dict(adapter.hint), model) if adapter.hint else None
    if control is not None:
        report += "\na hint network: CONTROL_NET takes a control picture, in Apply ControlNet"
    turned, turned_clip = apply(found, model, clip, strength, clip_strength)
    log.info("Load OFT: %s", report.replace("\n", "; "))
    return Loaded(model=turned, clip=turned_clip, oft=adapter, report=report, control=control)


def always_orthogonal(adapter: Adapter) -> Adapter:
    """Polynomials as the Cayley transform that they are near, at strength 1 too."""
    layers = tuple(
        dataclasses.replace(layer, rotation=dataclasses.replace(layer.rotation, series=())) for layer in adapter.layers
    )
    return dataclasses.replace(adapter, layers=layers)
