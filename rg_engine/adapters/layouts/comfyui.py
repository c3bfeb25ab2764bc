"""ComfyUI's Train LoRA, algorithms OFT and BOFT (``diffusion_model.``): LyCORIS' numbers, another limit, and what it adds to
biases and norms (``.diff_b``, ``.diff``)."""

from __future__ import annotations

import dataclasses

from ..adapter import Adapter, Contents, Layout, ReadOptions
from .lycoris import layers_of, unused

ADDED = (".diff", ".diff_b")


def read(contents: Contents, options: ReadOptions) -> Adapter:
    added = {key: tensor for key, tensor in contents.tensors.items() if key.endswith(ADDED)}
    turned = {key: tensor for key, tensor in contents.tensors.items() if key not in added}
    layers = layers_of(
        dataclasses.replace(contents, tensors=turned), per_output=False, endings=(".oft_blocks", ".alpha", ".rescale")
    )
    return Adapter(layout=LAYOUT.name, layers=layers, added=added, notes=unused(options))


LAYOUT = Layout(
    name="ComfyUI",
    claims=lambda key: key.startswith("diffusion_model.") and key.endswith(".oft_blocks"),
    read=read,
)
