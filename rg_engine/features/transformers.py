"""Transformers that make pictures: a row each, of what tells a family, and where its picture's tokens are.

Where the tokens are is tested by changing one patch of the latent and seeing where the map changes most. The default block
is two fifths of the way in, or one that is known to be good: what is read early costs less, as neither the graph nor
backward go any further.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from .contract import Backbone, Tap
from .layouts import Tokens
from .noise_embedding import NOISE_EMBEDDING_WIDTH

Side = Callable[[Any], int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A kind of transformer.

    signs: attributes that it has (and no family above it in FAMILIES). blocks: the lists that its blocks are in, in the
    order in which they run, and where the picture's tokens are in their outputs (patch is filled in). width, patch: of a
    network. depth: the default block, as a part of all; known: by the number of blocks, instead. streams, names_kernel: see
    Backbone. refine: more of a layout that only the network itself tells. variant: what else there is to its name.
    """

    name: str
    signs: tuple[str, ...]
    blocks: Mapping[str, Tokens]
    width: Side
    patch: Side = lambda network: int(network.patch_size)
    depth: float = 0.4
    known: Mapping[int, int] = dataclasses.field(default_factory=dict)
    streams: Callable[[Any], float] = lambda network: 15.0
    refine: Callable[[Any, str, Tokens], Tokens] = lambda network, part, layout: layout
    variant: Callable[[Any], str] = lambda network: ""
    names_kernel: bool = True

    def matches(self, network: nn.Module) -> bool:
        return all(_has(network, sign) for sign in self.signs)

    def backbone(self, network: Any) -> Backbone:
        width, patch = int(self.width(network)), int(self.patch(network))
        taps = []
        for part, tokens in self.blocks.items():
            layout = self.refine(network, part, dataclasses.replace(tokens, patch=patch))
            taps += [
                Tap(path=f"{part}.{i}", channels=width, layout=layout) for i in range(len(getattr(network, part, ()) or ()))
            ]
        place = self.known.get(len(taps), int(self.depth * len(taps)))
        return Backbone(
            name=f"{self.name}{self.variant(network)} of {len(taps)}x{width}", taps=(), channels=(), emb_tap=None,
            emb_width=NOISE_EMBEDDING_WIDTH, available=tuple(taps), blocks=tuple(tap.path for tap in taps),
            streams=self.streams(network), names_kernel=self.names_kernel,
        ).at([taps[place].path])  # fmt: skip


def transformer(network: nn.Module) -> Backbone | None:
    for family in FAMILIES:
        if family.matches(network):
            return family.backbone(network)
    return None


def _has(network: Any, sign: str) -> bool:
    for name in sign.split("."):
        if not hasattr(network, name):
            return False
        network = getattr(network, name)
    return True


def _hidden(network: Any) -> int:
    return network.hidden_size


def _last(network: Any) -> int:
    return network.patch_size[-1]


def _self_attention(network: Any) -> str:
    """SD3.5-M's blocks attend to the picture once more by itself."""
    return ".5-M" if any(getattr(block.x_block, "x_block_self_attn", False) for block in network.joint_blocks) else ""


def _sd3_streams(network: Any) -> float:
    block = network.joint_blocks[0].x_block
    if getattr(block, "x_block_self_attn", False):
        return 19
    return 10 if isinstance(getattr(block.attn, "ln_q", nn.Identity()), nn.Identity) else 13


def _flux_streams(network: Any) -> float:
    return 15.5 if network.patch_size == 1 else 11.2  # Flux.2, Flux


def _padded(network: Any, _part: str, layout: Tokens) -> Tokens:
    """Z-Image pads its streams to a multiple of tokens."""
    return dataclasses.replace(layout, multiple=getattr(network, "pad_tokens_multiple", None) or 1)


def _picture_first(network: Any, part: str, layout: Tokens) -> Tokens:
    """Older ComfyUIs put Hunyuan's picture before its text."""
    first = part == "single_blocks" and getattr(network.double_blocks[0], "flipped_img_txt", False)
    return dataclasses.replace(layout, place="start") if first else layout


_FLUX = {"double_blocks": Tokens(item=0), "single_blocks": Tokens(place="end", counted="img_in")}

FAMILIES = (
    Family(
        name="SD3", signs=("joint_blocks", "x_embedder", "t_embedder"), blocks={"joint_blocks": Tokens(item=1)},
        width=_hidden, known={24: 12}, streams=_sd3_streams, variant=_self_attention,
    ),
    Family(
        name="Chroma", signs=("double_blocks", "single_blocks", "img_in", "distilled_guidance_layer"), blocks=_FLUX,
        width=_hidden, depth=1 / 3, known={57: 18}, streams=_flux_streams,
    ),
    Family(
        name="Hunyuan", signs=("double_blocks", "single_blocks", "img_in.proj"),
        blocks={"double_blocks": Tokens(item=0), "single_blocks": Tokens(place="end")}, width=_hidden, patch=_last,
        refine=_picture_first, streams=lambda network: 11.0,
    ),
    Family(
        name="Flux", signs=("double_blocks", "single_blocks", "img_in"), blocks=_FLUX, width=_hidden,
        depth=1 / 3, known={57: 18, 56: 18, 25: 9}, streams=_flux_streams,
    ),
    Family(
        name="Lumina", signs=("noise_refiner", "context_refiner", "cap_embedder", "layers"),
        blocks={"noise_refiner": Tokens(place="end"), "layers": Tokens(place="end")}, width=lambda network: network.dim,
        refine=_padded, known={28: 12, 32: 13},
        streams=lambda network: 19 if getattr(network, "pad_tokens_multiple", None) else 22,
    ),
    Family(
        name="Qwen-Image", signs=("transformer_blocks", "txt_norm", "img_in", "time_text_embed"),
        blocks={"transformer_blocks": Tokens(item=1)}, width=lambda network: network.inner_dim,
        streams=lambda network: 12.1,
    ),
    Family(
        name="Wan", signs=("blocks", "patch_embedding", "time_projection"), blocks={"blocks": Tokens(exact=True)},
        width=lambda network: network.dim, patch=_last,
        streams=lambda network: 13.0,
    ),
    Family(
        name="AuraFlow", signs=("double_layers", "single_layers", "register_tokens"),
        blocks={"double_layers": Tokens(item=1), "single_layers": Tokens(place="end")},
        width=lambda network: network.init_x_linear.out_features, known={36: 14}, streams=lambda network: 16.0,
    ),
    Family(
        name="PixArt", signs=("blocks", "t_block", "y_embedder"), blocks={"blocks": Tokens()}, width=_hidden,
        names_kernel=False,
    ),
    Family(
        name="HiDream", signs=("double_stream_blocks", "single_stream_blocks", "caption_projection"),
        blocks={
            "double_stream_blocks": Tokens(item=0, counted="x_embedder"),
            "single_stream_blocks": Tokens(counted="x_embedder"),
        },
        width=lambda network: network.inner_dim, depth=0.25,
    ),
    Family(
        name="HunyuanDiT", signs=("blocks", "mlp_t5", "extra_embedder"), blocks={"blocks": Tokens()}, width=_hidden,
        names_kernel=False,
    ),
    Family(
        name="OmniGen2", signs=("noise_refiner", "ref_image_refiner", "layers"), blocks={"layers": Tokens(place="end")},
        width=_hidden,
    ),
    Family(
        name="Cosmos-Predict2", signs=("blocks", "x_embedder", "patch_spatial"), blocks={"blocks": Tokens()},
        width=lambda network: network.model_channels, patch=lambda network: network.patch_spatial,
    ),
    Family(
        name="Krea2", signs=("blocks", "first", "txtfusion", "tmlp"),
        blocks={"blocks": Tokens(place="end", counted="first")}, width=lambda network: network.first.out_features,
        patch=lambda network: network.patch,
    ),
    Family(
        name="Ernie-Image", signs=("layers", "x_embedder", "time_embedding", "final_linear"), blocks={"layers": Tokens()},
        width=_hidden, names_kernel=False,
    ),
)  # fmt: skip
#: Networks that can't be read out, and why.
UNREADABLE = dict.fromkeys(
    ("LTXVModel", "LTXAVModel", "AsymmDiTJoint", "GeneralDIT"), ": it makes videos, and one picture can be read out"
) | {"StageC": ": Stable Cascade makes a picture in two models", "StageB": ": Stable Cascade makes a picture in two models"}
