"""PEFT: ``base_model.model.`` names with an adapter_config.json beside them, which decides which way the numbers turn.

From 0.16 on ``.oft_R.weight`` [n, b (b - 1) / 2], side in: a polynomial near Cayley(+Q), or Cayley(-Q). 0.14 and 0.15
``.oft_r`` with ``.oft_s``, side in; up to 0.13 ``.oft_r`` alone, side out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ...errors import AdapterError
from ..adapter import Adapter, Contents, Layer, Layout, Named, ReadOptions, check_plain
from ..limits import project
from ..orthogonal import from_triangle, neumann_coefficients, skew, triangle
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
                f"{contents.name!r} is PEFT's, and its adapter_config.json is not beside it: the same numbers turn one way "
                "or the other. Put the file there, or choose convention: neumann (PEFT's default) or cayley"
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
        shared, magnitudes = bool(config.get("block_share")), parts.get(".oft_s")
        if config.get("coft"):  # b^2 is of the outputs in every version, (out / n)^2
            outputs = r.shape[0] * r.shape[-1] if magnitudes is None else len(magnitudes)
            count = int(config.get("r") or 0) or len(r)
            r = project(r, float(config.get("eps", 6e-5)) * math.ceil(outputs / count) ** 2 / len(r) ** 0.5)
        q = skew(r) / 2
        rotation = (
            Rotation(q=q, side="out", shared=shared)  # W' = B^T W
            if magnitudes is None
            else Rotation(q=-q, side="in", shared=shared, magnitudes=magnitudes.float())
        )
        layers.append(Layer(key=key, rotation=rotation))
    return tuple(layers)


def write(layers: Sequence[Named]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and adapter_config.json: side in, exact as Cayley(-Q), or as the polynomial that it was. Raises AdapterError
    if the layers differ in what PEFT has one setting for."""
    for layer in layers:
        check_plain(layer, "PEFT's files", side="in", series=True)
    rotations = [layer.rotation for layer in layers]
    series, shared = {rotation.series for rotation in rotations}, {rotation.shared for rotation in rotations}
    sizes = {rotation.block_size for rotation in rotations}
    counts = {layer.shape[1] // layer.rotation.block_size for layer in layers}
    if len(series) > 1 or len(shared) > 1 or (len(sizes) > 1 and len(counts) > 1):
        what = "one block size or one number of blocks" if len(sizes) > 1 and len(counts) > 1 else "one kind of rotation"
        raise AdapterError(f"PEFT's files have {what} for all layers, and these differ: save it as native")
    coefficients = next(iter(series))
    terms = next((t for t in range(2, 20) if neumann_coefficients(t, last_doubled=False) == coefficients), TERMS)
    if coefficients and neumann_coefficients(terms, last_doubled=False) != coefficients:
        raise AdapterError("it is a polynomial that PEFT no longer has (before 0.18): save it as native")
    config = {
        "peft_type": "OFT", "peft_version": "0.18.0", "bias": "none", "block_share": next(iter(shared)), "coft": False,
        "eps": 6e-5, "fan_in_fan_out": False, "inference_mode": True, "init_weights": True, "module_dropout": 0.0,
        "num_cayley_neumann_terms": terms, "use_cayley_neumann": bool(coefficients),
        "oft_block_size": next(iter(sizes)) if len(sizes) == 1 else 0, "r": next(iter(counts)) if len(sizes) > 1 else 0,
        "target_modules": [layer.diffusers or layer.own for layer in layers],
    }  # fmt: skip
    sign = 1.0 if coefficients else -1.0
    return {
        f"{PREFIX}{layer.diffusers or layer.own}.oft_R.weight": sign * triangle(layer.rotation.q) for layer in layers
    }, config


LAYOUT = Layout(
    name="PEFT",
    claims=lambda key: key.startswith(PREFIX) and key.endswith((".oft_R.weight", ".oft_r", ".oft_s")),
    read=read,
)
