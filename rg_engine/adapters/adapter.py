"""An adapter file as what it means: rotations by layer, and what its layout adds beside them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..errors import AdapterError
from .rotation import Rotation

Convention = Literal["auto", "neumann", "cayley"]
CONVENTIONS: tuple[Convention, ...] = get_args(Convention)
#: What stands before a layer's own name, in some layout or other.
PREFIX = re.compile(
    r"^(base_model\.model\.|model\.diffusion_model\.|diffusion_model\.|lora_unet_|lycoris_|oft_unet_|unet\.)"
)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Layer:
    """key: what the file calls the layer, without what follows its name."""

    key: str
    rotation: Rotation

    @property
    def name(self) -> str:
        """The layer's own name: diffusers' or LDM's, with dots or underscores."""
        name = PREFIX.sub("", self.key)
        authors = re.fullmatch(r"(.+)\.processor\.(to_[qkv]|to_out)_oft", name)
        return name if authors is None else f"{authors[1]}.{authors[2]}{'.0' if authors[2] == 'to_out' else ''}"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Adapter:
    """added: what is added to biases and norms, by ComfyUI's name of it (``KEY.diff``, ``KEY.diff_b``). hint: the network
    that makes features of a control picture, by its keys. notes: what whoever loads it should know. facts: plain values,
    kept in native files."""

    layout: str
    layers: tuple[Layer, ...]
    added: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    hint: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for layer in self.layers:
            layer.rotation.check(layer.key)
        for key, tensor in (*self.added.items(), *self.hint.items()):
            if not torch.isfinite(tensor).all():
                raise AdapterError(f"{key} holds NaN or infinite values: the training it comes from broke down")

    @property
    def sides(self) -> set[str]:
        return {layer.rotation.side for layer in self.layers}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """What a file may not say. coft_eps: of COFT, the number that its training was given; 0 is plain OFT. convention: of
    PEFT's numbers, where its adapter_config.json is not there."""

    coft_eps: float = 0.0
    convention: Convention = "auto"

    def __post_init__(self) -> None:
        if not 0.0 <= self.coft_eps < float("inf"):
            raise AdapterError(f"coft_eps is {self.coft_eps:g}: it must be 0 (plain OFT) or more")
        if self.convention not in CONVENTIONS:
            raise AdapterError(f"convention {self.convention!r} is unknown: expected one of {', '.join(CONVENTIONS)}")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Contents:
    """A file as it was read. config: the adapter_config.json beside it."""

    name: str
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)
    config: Mapping[str, Any] | None = None

    def by_layer(self, *endings: str) -> dict[str, dict[str, Tensor]]:
        """Tensors by layer and ending (``.alpha``). Raises AdapterError for a key that has none of the endings: what is not
        known may change what the rest means."""
        layers: dict[str, dict[str, Tensor]] = {}
        unknown = []
        for key, tensor in self.tensors.items():
            ending = next((ending for ending in endings if key.endswith(ending)), None)
            if ending is None:
                unknown.append(key)
            else:
                layers.setdefault(key.removesuffix(ending), {})[ending] = tensor
        if unknown:
            raise AdapterError(
                f"{self.name!r} holds what its layout does not explain: "
                f"{', '.join(unknown[:3])}{' ...' if unknown[3:] else ''}. Such keys change what the others mean, so "
                "nothing is loaded: convert it with the tool that made it"
            )
        return layers

    def square(self, key: str, tensor: Tensor, dims: tuple[int, ...] = (3,)) -> Tensor:
        """Blocks in fp32. Raises AdapterError unless they are square and of so many dimensions."""
        if tensor.ndim not in dims or tensor.shape[-1] != tensor.shape[-2] or not tensor.numel():
            raise AdapterError(
                f"{self.name!r}: {key} has the shape {tuple(tensor.shape)}: expected square blocks in {dims[-1]} dimensions"
            )
        return tensor.float()

    def block_size(self, key: str, tensor: Tensor) -> int:
        """Of triangles (..., b (b - 1) / 2). Raises AdapterError unless the number is one."""
        count = tensor.shape[-1] if tensor.ndim >= 2 else 0
        b = round((1 + (1 + 8 * count) ** 0.5) / 2)
        if not count or b * (b - 1) // 2 != count:
            raise AdapterError(
                f"{self.name!r}: {key} has the shape {tuple(tensor.shape)}: expected rows of b (b - 1) / 2 numbers, a "
                "triangle"
            )
        return b


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """claims: whether a key is of this layout and no other. read: a file of it to what it means."""

    name: str
    claims: Callable[[str], bool]
    read: Callable[[Contents, ReadOptions], Adapter]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Named:
    """A layer of a model, for writing: its key in the model, the weight's shape, diffusers' name if it has one."""

    key: str
    shape: tuple[int, ...]
    diffusers: str | None
    rotation: Rotation

    @property
    def own(self) -> str:
        """LDM's name, or whatever the model calls it."""
        return PREFIX.sub("", self.key).removesuffix(".weight")


def check_plain(
    layer: Named, what: str, *, side: str, series: bool = False, magnitudes: bool = False, butterfly: bool = False
) -> None:
    """Raises AdapterError if a layer has what this kind of file can't hold."""
    rotation = layer.rotation
    reasons = [
        (rotation.side != side, f"it turns {rotation.side}, and they turn {side}"),
        (bool(rotation.series) and not series, "it is a polynomial, not a rotation (load it with orthogonal on)"),
        (rotation.magnitudes is not None and not magnitudes, "it has magnitudes"),
        (rotation.is_butterfly and not butterfly, "it is a butterfly"),
        (rotation.rows is not None, "it turns a part of a fused weight"),
    ]
    for wrong, reason in reasons:
        if wrong:
            raise AdapterError(f"{what} can't hold {layer.key} exactly: {reason}. Save it as native, or as a difference")
