"""PEFT: ``base_model.model.`` names with an adapter_config.json beside them, which decides which way the numbers turn.

From 0.16 on ``.oft_R.weight`` [n, b (b - 1) / 2], side in: a polynomial near Cayley(+Q), or Cayley(-Q). 0.14 and 0.15 ``.oft_r``
with ``.oft_s``, side in; up to 0.13 ``.oft_r`` alone, side out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...errors import AdapterError
from ..adapter import Adapter, Contents, Layer, Layout, ReadOptions
from ..limits import coft_bound, project
from ..orthogonal import from_triangle, neumann_coefficients, skew
from ..rotation import Rotation

PREFIX = "base_model.model."
TERMS = 5  # PEFT's default


def read(contents: Contents, options: ReadOptions) -> Adapter:
    found = contents.by_layer(".oft_R.weight", ".oft_r", ".oft_s")
    config = contents.config or {}
    if config.get("peft_type", "OFT") != "OFT" or config.get("fan_in_fan_out"):
        what = f"peft_type {config.get('peft_type')!r}" if config.get("peft_type", "OFT") != "OFT" else "fan_in_fan_out"
        raise AdapterError(f"{contents.name!r}: its adapter_config.json says {what}, which is not OFT as it is read here")
    old = any(".oft_r" in parts for parts in found.values())
    if old:
        return Adapter(layout=f"{LAYOUT.name} up to 0.15", layers=_old(contents, found, config))
    notes = []
    neumann, doubled, terms = bool(config.get("use_cayley_neumann")), "peft_version" not in config, TERMS
    if contents.config is None:
        if options.convention == "auto":
            raise AdapterError(
                f"{contents.name!r} is PEFT's, and its adapter_config.json is not beside it: the same numbers turn one way or the "
                "other. Put the file there, or choose convention: neumann (PEFT's default) or cayley"
            )
        neumann, doubled = options.convention == "neumann", False
        notes.append(f"without adapter_config.json: read as {options.convention} of PEFT 0.18 or later")
    else:
        terms = int(config.get("num_cayley_neumann_terms", TERMS))
        eps_used = bool(options.coft_eps) or options.convention != "auto"
        notes += ["adapter_config.json is there: coft_eps and convention are not used"] if eps_used else []
        options = ReadOptions(coft_eps=float(config.get("eps", 6e-5)) if config.get("coft") else 0.0)
    layers = []
    for key, parts in found.items():
        v = parts[".oft_R.weight"].float()
        q = from_triangle(v, contents.block_size(f"{key}.oft_R.weight", v))
        if options.coft_eps:
            q = project(q, options.coft_eps / len(q) ** 0.5)  # without b^2
        shared = bool(config["block_share"]) if "block_share" in config else len(q) == 1
        series = neumann_coefficients(terms, last_doubled=doubled) if neumann else ()
        layers.append(Layer(key=key, rotation=Rotation(q=q if neumann else -q, side="in", shared=shared, series=series)))
    return Adapter(layout=LAYOUT.name, layers=tuple(layers), notes=tuple(notes))


def _old(contents: Contents, found: Mapping[str, Mapping[str, Tensor]], config: Mapping[str, Any]) -> tuple[Layer, ...]:
    layers = []
    for key, parts in found.items():
        r = contents.square(f"{key}.oft_r", parts[".oft_r"])
        if config.get("coft"):
            r = project(r, coft_bound(float(config.get("eps", 6e-5)), len(r), r.shape[-1]))
        shared, magnitudes = bool(config.get("block_share")), parts.get(".oft_s")
        q = skew(r) / 2
        rotation = (
            Rotation(q=q, side="out", shared=shared)  # W' = B^T W
            if magnitudes is None
            else Rotation(q=-q, side="in", shared=shared, magnitudes=magnitudes.float())
        )
        layers.append(Layer(key=key, rotation=rotation))
    return tuple(layers)


LAYOUT = Layout(
    name="PEFT",
    claims=lambda key: key.startswith(PREFIX) and key.endswith((".oft_R.weight", ".oft_r", ".oft_s")),
    read=read,
)
