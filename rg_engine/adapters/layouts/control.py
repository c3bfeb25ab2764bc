"""Zeju1997/oft, oft-control: a checkpoint of rotations under LDM's names, beside a hint network and the frozen weights."""

from __future__ import annotations

import re

from torch import Tensor

from ...errors import AdapterError
from ..adapter import Adapter, Contents, Layer, Layout, ReadOptions
from ..limits import coft_bound, project
from ..orthogonal import skew
from ..rotation import Rotation

HINT = "control_model.input_hint_block."
TURNED = re.compile(r"model\.diffusion_model\.(.+)\.(R|scaling_factors)")
#: A layer's frozen weight, and the rest of the checkpoint: what the loaded model has itself.
FROZEN = re.compile(
    r".+\.OFT\.(weight|bias)|[^.]+"
    r"|(model\.diffusion_model|model_ema|control_model|first_stage_model|cond_stage_model)\..+"
)
CONVOLUTION = re.compile(r"\.(in_layers\.2|out_layers\.3|skip_connection|op|input_blocks\.0\.0|diffusion_model\.out\.2)$")


def read(contents: Contents, options: ReadOptions) -> Adapter:
    """R [n, b, b]: side in, as oft-db. R [b, b], one for all blocks: the other sign. R [in, k^2, k^2]: a convolution's."""
    found: dict[str, dict[str, Tensor]] = {}
    hint, frozen, unknown = {}, 0, []
    for key, tensor in contents.tensors.items():
        turned = TURNED.fullmatch(key)
        if turned is not None:
            found.setdefault(f"model.diffusion_model.{turned[1]}", {})[turned[2]] = tensor
        elif key.startswith(HINT):
            hint[key.removeprefix(HINT)] = tensor.float()
        elif FROZEN.fullmatch(key):
            frozen += 1
        else:
            unknown.append(key)
    if unknown:
        raise AdapterError(f"{contents.name!r} holds what a control checkpoint does not: {', '.join(unknown[:3])}")
    layers = tuple(_layer(contents, key, parts, options.coft_eps) for key, parts in found.items())
    notes = [] if options.coft_eps else [
        "the file does not say whether it is COFT: it is read as plain OFT. If it was trained with COFT, give coft_eps"
    ]  # fmt: skip
    if frozen:
        notes.append(f"{frozen} frozen tensors of the checkpoint are not used: the loaded model has its own")
    return Adapter(layout=LAYOUT.name, layers=layers, hint=hint, notes=tuple(notes))


def _layer(contents: Contents, key: str, parts: dict[str, Tensor], eps: float) -> Layer:
    if "R" not in parts:
        raise AdapterError(f"{contents.name!r}: {key} has scaling factors and no R: the file is not whole")
    r = contents.square(f"{key}.R", parts["R"], (2, 3))
    shared, convolution = r.ndim == 2, bool(CONVOLUTION.search(key))
    r = r[None] if shared else r
    if convolution and not eps:
        raise AdapterError(
            f"{contents.name!r} turns the convolution {key}, which the authors' code always limits as COFT does: give "
            "coft_eps, the number of its training"
        )
    if eps:
        r = project(r, coft_bound(eps, *r.shape[:2]))
    q = skew(r) / 2 if shared else -skew(r) / 2
    return Layer(
        key=key,
        rotation=Rotation(
            q=q, side="memory" if convolution else "in", shared=shared,
            magnitudes=parts["scaling_factors"].float() if "scaling_factors" in parts else None,
        ),
    )  # fmt: skip


LAYOUT = Layout(name="authors' control", claims=lambda key: bool(TURNED.fullmatch(key)), read=read)
