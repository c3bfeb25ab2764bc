"""kohya-ss/sd-scripts (``oft_unet_``): LyCORIS' diag-OFT, always limited (alpha 0: no turn); Flux' fused rows in parts."""

from __future__ import annotations

import re

from torch import Tensor

from ...errors import AdapterError
from ..adapter import Adapter, Contents, Layer, Layout, ReadOptions
from ..limits import limit_layer
from ..orthogonal import skew
from ..rotation import Rotation
from .lycoris import unused

PREFIX = "oft_unet_"
BLOCKS = re.compile(r"(.+)\.oft_blocks(?:\.(\d+))?")


def read(contents: Contents, options: ReadOptions) -> Adapter:
    blocks: dict[str, dict[int | None, Tensor]] = {}
    alphas: dict[str, float] = {}
    for key, tensor in contents.tensors.items():
        found = BLOCKS.fullmatch(key)
        if found is not None:
            blocks.setdefault(found[1], {})[None if found[2] is None else int(found[2])] = tensor
        elif key.endswith(".alpha"):
            alphas[key.removesuffix(".alpha")] = float(tensor)
        else:
            raise AdapterError(f"{contents.name!r} holds {key}, which kohya's OFT does not: nothing is loaded")
    missing = sorted(set(blocks) ^ set(alphas))
    if missing:
        raise AdapterError(f"{contents.name!r}: {missing[0]} has blocks or an alpha, and not both: the file is not whole")
    layers: list[Layer] = []
    for key, parts in blocks.items():
        first = 0
        for part in sorted(parts, key=lambda number: number or 0):
            q = -skew(contents.square(f"{key}.oft_blocks", parts[part]))
            count = q.shape[0] * q.shape[-1]
            rotation = Rotation(
                q=limit_layer(q, alphas[key] * count), side="out", rows=None if part is None else (first, count)
            )
            layers.append(Layer(key=key, rotation=rotation))
            first += count
    notes = ("trained before September 2024, kohya's OFT turned biases as well: they are left as they are, as when merging",)
    return Adapter(layout=LAYOUT.name, layers=tuple(layers), notes=notes + unused(options))


LAYOUT = Layout(name="kohya", claims=lambda key: key.startswith(PREFIX) and bool(BLOCKS.fullmatch(key)), read=read)
