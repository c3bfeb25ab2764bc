"""OneTrainer (OFT_2): PEFT's triangles as a polynomial of five terms near Cayley(+Q), side in; convolutions W B, not W B^T."""

from __future__ import annotations

from ...errors import AdapterError
from ..adapter import Adapter, Contents, Layer, Layout, ReadOptions
from ..orthogonal import from_triangle, neumann_coefficients
from ..rotation import Rotation

SERIES = neumann_coefficients(5, last_doubled=False)


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


LAYOUT = Layout(
    name="OneTrainer",
    claims=lambda key: key.endswith((".oft_R.weight", ".oft_R.scaled_oft")) and not key.startswith("base_model.model."),
    read=read,
)
