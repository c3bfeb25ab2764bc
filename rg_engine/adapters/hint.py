"""The hint network of oft-control: a control picture to the features that are added after the first layer of the UNet."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..errors import AdapterError

#: Where the picture is halved, of eight convolutions.
HALVED = (2, 4, 6)
LAYERS = 8


class HintNetwork(nn.Module):
    """Pictures (B, 3, 8h, 8w) in 0..1 to features (B, C, h, w): convolutions of 3x3 with SiLU between them."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        """From the tensors of a checkpoint, ``0.weight``, ``0.bias``, ``2.weight``, ... Raises AdapterError if they are
        others."""
        super().__init__()
        self.convolutions = nn.ModuleList()
        channels = 3
        for i in range(LAYERS):
            weight, bias = tensors.get(f"{2 * i}.weight"), tensors.get(f"{2 * i}.bias")
            if weight is None or bias is None or weight.ndim != 4 or tuple(weight.shape[1:]) != (channels, 3, 3):
                found = "missing" if weight is None or bias is None else str(tuple(weight.shape))
                raise AdapterError(
                    f"the hint network's layer {2 * i} is {found}: expected a 3x3 convolution of {channels} channels"
                )
            layer = nn.Conv2d(channels, len(weight), 3, padding=1, stride=2 if i in HALVED else 1)
            layer.load_state_dict({"weight": weight, "bias": bias})
            self.convolutions.append(layer)
            channels = len(weight)
        self.requires_grad_(False)

    @property
    def features(self) -> int:
        """Channels of the features."""
        return self.convolutions[-1].out_channels  # type: ignore[return-value]

    def forward(self, pictures: Tensor) -> Tensor:
        x = pictures
        for layer in self.convolutions[:-1]:
            x = torch.nn.functional.silu(layer(x))
        return self.convolutions[-1](x)
