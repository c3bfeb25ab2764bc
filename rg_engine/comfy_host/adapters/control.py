"""A control checkpoint's hint network as a CONTROL_NET, for Apply ControlNet."""

from __future__ import annotations

from typing import Any

import torch
from comfy.controlnet import T2IAdapter
from torch import Tensor, nn

from ...adapters.hint import HintNetwork
from ...errors import AdapterError


class _Features(nn.Module):
    """What ComfyUI asks of an adapter that gives the UNet features: they are added once, after ``input_blocks.0``."""

    unshuffle_amount = 8

    def __init__(self, network: HintNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, pictures: Tensor) -> dict[str, list[Tensor]]:
        return {"input": [self.network(pictures)]}


def control_net(hint: dict[str, Tensor], model: Any) -> Any:
    """Raises AdapterError if it was made for a UNet of another width."""
    with torch.inference_mode(False):
        network = HintNetwork(hint)
    wanted = model.model.model_config.unet_config.get("model_channels")
    if network.features != wanted:
        raise AdapterError(
            f"the hint network makes {network.features} channels and the model takes {wanted}: another kind of model"
        )
    return T2IAdapter(_Features(network), channels_in=3, compression_ratio=8, upscale_algorithm="nearest-exact")
