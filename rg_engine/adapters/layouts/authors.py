"""Zeju1997/oft, oft-db and oft-t2i: side in, W' = W blockdiag(Cayley(-skew(R) / 2))^T, on diffusers' attention."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import AdapterError
from ..adapter import Adapter, Contents, Layer, Layout, Named, ReadOptions, check_plain
from ..limits import coft_bound, project
from ..orthogonal import skew
from ..rotation import Rotation

ENDINGS = (".R", ".cross_attention_dim", ".hidden_size", ".oft_eps", ".oft_is_coft")


def read(contents: Contents, options: ReadOptions) -> Adapter:
    """COFT projects each R before it is used, and the file was saved before that: oft-t2i's says so, oft-db's does not."""
    layers, notes = [], set()
    for key, parts in contents.by_layer(*ENDINGS).items():
        r, eps = contents.square(f"{key}.R", parts[".R"]), options.coft_eps
        if ".oft_is_coft" in parts:
            told = float(parts[".oft_eps"]) if bool(parts[".oft_is_coft"]) else 0.0
            if eps:
                notes.add(
                    f"coft_eps {eps:g} is not used: the file says {f'COFT with {told:.6g}' if told else 'plain OFT'} itself"
                )
            eps = told
        elif not eps:
            notes.add(
                "the file does not say whether it is COFT: it is read as plain OFT. If it was trained with COFT, give "
                "coft_eps"
            )
        if eps:
            r = project(r, coft_bound(eps, *r.shape[:2]))
        layers.append(Layer(key=key, rotation=Rotation(q=-skew(r) / 2, side="in")))
    return Adapter(layout=LAYOUT.name, layers=tuple(layers), notes=tuple(sorted(notes)))


def write(layers: Sequence[Named]) -> dict[str, Tensor]:
    """Side in, on attention, without magnitudes: exact, as the R that is skew."""
    tensors: dict[str, Tensor] = {}
    for layer in layers:
        found = re.fullmatch(r"(.+)\.(to_[qkv]|to_out\.0)", layer.diffusers or "")
        if found is None:
            raise AdapterError(
                f"the authors' files hold diffusers' attention layers only, and {layer.key} is none: save it as native"
            )
        check_plain(layer, "the authors' files", side="in")
        key = f"{found[1]}.processor.{found[2].removesuffix('.0')}_oft"
        q = layer.rotation.q.expand(layer.shape[1] // layer.rotation.block_size, -1, -1)  # a shared block as many
        tensors[f"{key}.R"] = -q.contiguous()
        tensors[f"{key}.cross_attention_dim"], tensors[f"{key}.hidden_size"] = (
            torch.tensor(size) for size in (layer.shape[1], layer.shape[0])
        )
    return tensors


LAYOUT = Layout(
    name="authors", claims=lambda key: "_oft." in key and ".processor." in key and key.endswith(ENDINGS), read=read
)
