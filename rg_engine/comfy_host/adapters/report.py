"""What an adapter does to a model, in words and figures."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor, nn

from ...adapters import Adapter, Rotation
from ...adapters.energy import hyperspherical_energy
from ...adapters.orthogonal import largest_angle, orthogonality_error
from .apply import Fit, Fitted
from .names import stored_weights

#: Energies are measured on so many of the smallest layers: their cost grows with the square of the width.
MEASURED_LAYERS = 4
SIDES = {
    "in": "inputs (keeps the angles between neurons)",
    "out": "outputs (keeps the angles between inputs)",
    "memory": "a convolution's memory (keeps neither)",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Energies:
    """The largest drift of the mean hyperspherical energy among ``layers`` measured layers, and where it started."""

    layers: int
    rows: float
    columns: float
    start: float


def describe(name: str, adapter: Adapter, found: Fit, model: Any, strength: float) -> str:
    """Layout, layers, side, largest angle, energy, and what was not used and why."""
    layers = found.layers
    in_clip = sum(layer.of_clip for layer in layers)
    lines = [
        f"{name}: {adapter.layout}, {len(layers)} of {len(adapter.layers)} layers"
        + (f" ({in_clip} of the text encoder)" if in_clip else "")
        + (f", {len(found.added)} biases and norms added to" if found.added else ""),
        *(f"turns {SIDES[side]}" for side in sorted(adapter.sides)),
        f"strength {strength:g}, largest angle at 1: {max(largest_angle(layer.rotation.q) for layer in layers):.1f} degrees"
        + (" (of a stage)" if any(layer.rotation.is_butterfly for layer in layers) else ""),
    ]
    if strength == 1.0 and any(layer.rotation.series for layer in layers):
        worst = max(orthogonality_error(layer.rotation.blocks()) for layer in layers)
        lines.append(f"a polynomial, as trained: max |R R^T - I| {worst:.1e}; at other strengths, or with orthogonal on, 0")
    energies = measure(layers, model, strength)
    if energies is not None:
        lines.append(
            f"energy of {energies.layers} measured layers: neurons {energies.start:.4f}, drift {energies.rows:.1e}; inputs, "
            f"drift {energies.columns:.1e}"
        )
    if any(layer.rotation.magnitudes is not None for layer in layers):
        lines.append("with magnitudes: neurons change their lengths as well")
    if found.unused:
        lines.append(f"not used, not in this model: {len(found.unused)} ({', '.join(found.unused[:3])})")
    before = [key for key in {layer.place[0] for layer in layers if not layer.of_clip} if model.patches.get(key)]
    if before:
        lines.append(
            f"{len(before)} of these layers were patched before (a LoRA?): they are turned with it. Put Load OFT first to "
            "turn the model's own weights alone"
        )
    return "\n".join([*lines, *(f"note: {note}" for note in adapter.notes)])


def measure(layers: tuple[Fitted, ...], model: Any, strength: float) -> Energies | None:
    """None if no layer's weights can be seen as they are: quantised ones, or those that are made when they run."""
    state = stored_weights(model)
    seen: list[tuple[Tensor, Rotation]] = []
    for layer in layers:
        weight: Any = None if layer.of_clip or layer.place[1] is not None else state.get(layer.place[0])
        if type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point() and not weight.is_meta:
            seen.append((weight, layer.rotation))
    seen = sorted(seen, key=lambda pair: pair[0].numel())[:MEASURED_LAYERS]
    if not seen:
        return None
    before = [(hyperspherical_energy(w), hyperspherical_energy(w, "columns")) for w, _ in seen]
    turned = [rotation.turn(w, strength) for w, rotation in seen]
    after = [(hyperspherical_energy(w), hyperspherical_energy(w, "columns")) for w in turned]
    drifts = [(abs(a[0] - b[0]), abs(a[1] - b[1])) for a, b in zip(after, before, strict=True)]
    return Energies(layers=len(seen), rows=max(d[0] for d in drifts), columns=max(d[1] for d in drifts), start=before[0][0])
