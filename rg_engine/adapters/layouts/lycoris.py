"""LyCORIS diag-OFT and BOFT (``lycoris_`` or ``lora_unet_``): side out, W' = blockdiag(Cayley(skew(blocks)))^T W.

``.alpha`` limits all blocks of a layer together to a norm of alpha times the number of outputs; ``.rescale`` multiplies the
neurons after the turn. BOFT's stages turn without the transpose. 2.0 saved the matrices themselves (``.oft_diag``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import AdapterError
from ..adapter import Adapter, Contents, Layer, Layout, Named, ReadOptions, check_plain
from ..limits import limit_layer
from ..orthogonal import inverse_cayley, orthogonality_error, skew
from ..rotation import Rotation

PREFIXES = ("lycoris_", "lora_unet_", "lora_te")
ENDINGS = (".oft_blocks", ".alpha", ".rescale", ".oft_diag")


def read(contents: Contents, options: ReadOptions) -> Adapter:
    return Adapter(layout=LAYOUT.name, layers=layers_of(contents, per_output=True), notes=unused(options))


def layers_of(contents: Contents, *, per_output: bool, endings: tuple[str, ...] = ENDINGS) -> tuple[Layer, ...]:
    """per_output: whether alpha's limit is times the number of outputs."""
    layers = []
    for key, parts in contents.by_layer(*endings).items():
        if ".oft_diag" in parts:
            layers.append(Layer(key=key, rotation=_matrices(contents, key, parts)))
            continue
        if ".oft_blocks" not in parts:
            raise AdapterError(f"{contents.name!r}: {key} has {', '.join(parts)} and no .oft_blocks: the file is not whole")
        q = skew(contents.square(f"{key}.oft_blocks", parts[".oft_blocks"], (3, 4)))
        alpha = float(parts.get(".alpha", 0.0))
        if alpha > 0:
            q = limit_layer(q, alpha * q.shape[-3] * q.shape[-1] if per_output else alpha)
        rescale = _rescale(contents, key, parts)
        layers.append(Layer(key=key, rotation=Rotation(q=q if q.ndim == 4 else -q, side="out", magnitudes=rescale)))
    return tuple(layers)


def unused(options: ReadOptions) -> tuple[str, ...]:
    return (
        (f"coft_eps {options.coft_eps:g} is not used: this layout has its own limit in the file",)
        if options.coft_eps
        else ()
    )


def _rescale(contents: Contents, key: str, parts: dict[str, Tensor]) -> Tensor | None:
    rescale = parts.get(".rescale")
    if rescale is None:
        return None
    if rescale.ndim < 2:
        raise AdapterError(
            f"{contents.name!r}: {key}.rescale has the shape {tuple(rescale.shape)}, as LyCORIS 2.1 saved it, which "
            "multiplied inputs: expected (outputs, 1). Convert the file with LyCORIS"
        )
    return rescale.float().reshape(-1, 1)


def _matrices(contents: Contents, key: str, parts: dict[str, Tensor]) -> Rotation:
    """W' = blockdiag(oft_diag)^T W, with magnitudes: the rows' lengths of oft_diag^T, which is orthogonal without them."""
    r = contents.square(f"{key}.oft_diag", parts[".oft_diag"]).mT
    lengths = r.norm(dim=-1, keepdim=True)
    rotation = r / lengths
    if not (orthogonality_error(rotation) < 1e-2 and bool((rotation.double().det() > 0).all())):
        raise AdapterError(f"{contents.name!r}: {key}.oft_diag is no rotation times magnitudes: it can't be read as OFT")
    plain = bool((lengths - 1).abs().max() < 1e-5)
    return Rotation(q=inverse_cayley(rotation).float(), side="out", magnitudes=None if plain else lengths.reshape(-1, 1))


def write(layers: Sequence[Named]) -> dict[str, Tensor]:
    """Side out only; without a limit (alpha 0), which its loader and ComfyUI's want said."""
    tensors = {}
    for layer in layers:
        check_plain(layer, "LyCORIS' files", side="out", magnitudes=True, butterfly=True)
        rotation = layer.rotation
        n, b = rotation.q.shape[-3:-1]
        if not rotation.is_butterfly and b > n:
            raise AdapterError(
                f"LyCORIS takes blocks no larger than their number, and {layer.key} has {n} of {b}: save it as native"
            )
        key = f"lycoris_{(layer.diffusers or layer.own).replace('.', '_')}"
        tensors[f"{key}.oft_blocks"] = (rotation.q if rotation.is_butterfly else -rotation.q) / 2
        tensors[f"{key}.alpha"] = torch.tensor(0.0)
        if rotation.magnitudes is not None:
            tensors[f"{key}.rescale"] = rotation.magnitudes.reshape(-1, *[1] * (len(layer.shape) - 1))
    return tensors


LAYOUT = Layout(
    name="LyCORIS",
    claims=lambda key: key.startswith(PREFIXES) and key.endswith((".oft_blocks", ".oft_diag")),
    read=read,
)
