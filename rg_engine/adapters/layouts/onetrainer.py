"""OneTrainer (OFT_2): PEFT's triangles, a polynomial of five terms near Cayley(+Q), side in; convolutions turn back."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...errors import AdapterError
from ..adapter import Adapter, Contents, Layer, Layout, Named, ReadOptions, check_plain
from ..orthogonal import from_triangle, neumann_coefficients, spectral_norm, triangle
from ..rotation import Rotation

SERIES = neumann_coefficients(5, last_doubled=False)
#: Of the spectral norm of Q, up to which the polynomial is taken for Cayley's.
LARGEST_Q = 0.1


def read(contents: Contents, options: ReadOptions) -> Adapter:
    layers = []
    for key, parts in contents.by_layer(".oft_R.weight", ".oft_R.scaled_oft").items():
        if ".oft_R.weight" not in parts:
            raise AdapterError(f"{contents.name!r}: {key} has no .oft_R.weight: the file is not whole")
        v = parts[".oft_R.weight"].float()
        b = contents.block_size(f"{key}.oft_R.weight", v)
        q = from_triangle(v, b)
        if bool(parts.get(".oft_R.scaled_oft", False)):
            q = q / (2 * (b - 1) ** 0.5)
        rotation = Rotation(q=q, side="in", shared=len(q) == 1, series=SERIES, convolutions_back=True)
        layers.append(Layer(key=key, rotation=rotation))
    return Adapter(layout=LAYOUT.name, layers=tuple(layers))


def write(layers: Sequence[Named]) -> dict[str, Tensor]:
    """Side in: exact for what is this polynomial; for a rotation as near as |Q|^4, refused above 0.1."""
    tensors = {}
    for layer in layers:
        check_plain(layer, "OneTrainer's files", side="in", series=True)
        size = spectral_norm(layer.rotation.q)
        if layer.rotation.series != SERIES and (layer.rotation.series or size > LARGEST_Q):
            raise AdapterError(
                f"OneTrainer's polynomial is not this rotation ({layer.key} has |Q| {size:.2g}, above {LARGEST_Q}): save it "
                "as PEFT, authors or native, which hold it exactly"
            )
        q = -layer.rotation.q if len(layer.shape) > 2 else layer.rotation.q
        tensors[f"lora_unet_{(layer.diffusers or layer.own).replace('.', '_')}.oft_R.weight"] = triangle(q)
    return tensors


LAYOUT = Layout(
    name="OneTrainer",
    claims=lambda key: key.endswith((".oft_R.weight", ".oft_R.scaled_oft")) and not key.startswith("base_model.model."),
    read=read,
)
