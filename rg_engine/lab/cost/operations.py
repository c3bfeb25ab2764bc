"""What a step computes and keeps for backward, counted on tensors without numbers: the same on every machine."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from comfy.ldm.modules.attention import attention_pytorch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ...comfy_host.loaded.gradient_scope import GradientScope, Graph
from ...features import Backbone, FeatureTap, detect_backbone
from ...guidance import GuidanceSettings
from ...heads import aggregation
from ...training import new_head
from .models import TOKENS, Shape, control_network, describe


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counts:
    """One branch of one picture in fp16, and one head in fp32. Operations are multiply-adds; kept are the most bytes that
    are kept for backward at a time, weights apart."""

    backbone: Backbone
    forward: float
    backward: float
    head: float
    controlnet: float
    kept: int
    kept_by_head: int
    features: int  # bytes of the tapped maps in fp32

    @property
    def guided_bytes(self) -> int:
        """Of a guided branch: the network's graph, the head's, and the features' copies in fp32 and their gradients."""
        return self.kept + self.kept_by_head + 2 * self.features


def count(shape: Shape, graph: Graph) -> Counts:
    """Count a network's forward pass with a graph, its backward, and the same of a head."""
    side, config, light = shape.cells, shape.config, graph == "light"
    aggregation.interpolation.cache_clear()  # of tensors with numbers
    try:
        with FakeTensorMode(), torch.inference_mode(False), torch.enable_grad():
            network = describe(shape, torch.float16).get_model({}, "").diffusion_model.requires_grad_(False)
            backbone = detect_backbone(network)
            x = torch.empty(1, config["in_channels"], side, side, dtype=torch.float16, requires_grad=True)
            inputs = {"context": torch.empty(1, TOKENS, config["context_dim"], dtype=torch.float16)}
            if config["adm_in_channels"]:
                inputs["y"] = torch.empty(1, config["adm_in_channels"], dtype=torch.float16)
            options = {"optimized_attention_override": lambda _, *args, **kwargs: attention_pytorch(*args, **kwargs)}
            time = torch.tensor([500.0])
            with (
                GradientScope(network, graph), FeatureTap(network, backbone) as tap,
                count_kept_bytes(*network.parameters()) as kept,
            ):  # fmt: skip
                with Operations() as forward:
                    network(x, time, transformer_options=options, **inputs)
                maps, found = tap.take()
                with Operations() as backward:  # what runs again keeps something too, on top of what is still kept
                    torch.autograd.grad(maps, x, [torch.empty_like(map_) for map_ in maps])
            emb = backbone.emb(found, torch.ones(1))
            head, kept_by_head = _count_head(shape, backbone, maps, emb, light)
            with Operations() as controlled, torch.no_grad():
                hint = torch.empty(1, 3, 8 * side, 8 * side, dtype=torch.float16)
                control_network(shape, torch.float16)(x=x, hint=hint, timesteps=time, **inputs)
    finally:
        aggregation.interpolation.cache_clear()  # of tensors without numbers
    return Counts(
        backbone=backbone, forward=forward.count, backward=backward.count, head=head, controlnet=controlled.count,
        kept=kept[0], kept_by_head=kept_by_head, features=4 * sum(map_.numel() for map_ in maps),
    )  # fmt: skip


def _count_head(shape: Shape, backbone: Backbone, maps: list[Tensor], emb: Tensor, light: bool) -> tuple[float, int]:
    """A spatial head's operations, with its backward, and bytes kept."""
    size = shape.cells, shape.cells
    network = new_head("spatial", backbone, name="counted", output_channels=3, projection=shape.projection).network
    copies, emb = [map_.detach().float().requires_grad_() for map_ in maps], emb.detach().float()
    with Operations() as counted, count_kept_bytes(*network.parameters(), *copies) as kept:
        readout = network(copies, emb, size, light=light)
        torch.autograd.grad(readout, copies, torch.empty_like(readout))
    if not light:
        return counted.count, kept[0]
    with count_kept_bytes(*network.parameters(), *copies) as one:  # torch's checkpoint hides what runs again from us
        network.get_submodule(f"bottleneck_layers.{len(copies) - 1}")(copies[-1], emb, size)
    return counted.count, kept[0] + one[0]


def operations_table(shape: Shape) -> list[dict[str, Any]]:
    """A row a way of making a step with two prompts: its operations over a plain step's, and bytes kept for backward."""
    full, light = count(shape, "full"), count(shape, "light")
    plain, runs = 2 * full.forward, GuidanceSettings().head_runs
    guided = full.forward + full.backward
    maps = 3 * full.features  # where the features should go, the maps on the way there and their gradients
    reference = plain + 2 * (full.forward + full.backward + full.head)
    ways = {
        "plain": (plain, 0),
        "fast": (guided + runs * full.head, full.guided_bytes + maps),
        "fast, 3 heads": (guided + 3 * runs * full.head, full.guided_bytes + maps),
        "fast, with the negative prompt": (full.forward + guided + runs * full.head, full.guided_bytes + maps),
        "fast, with it, the gradient alone": (full.forward + guided + full.head, full.guided_bytes),
        "fast, light graph": (full.forward + light.backward + runs * light.head, light.guided_bytes + maps),
        "reference": (reference, full.guided_bytes + full.kept),
        "ControlNet": (plain + 2 * full.controlnet, 0),
    }
    return [
        {"a step": name, "operations": round(operations / plain, 3), "MiB kept": round(kept / 2**20)}
        for name, (operations, kept) in ways.items()
    ]


#: The CPU's fused attention, and where its query, key and value are among its arguments: products of each pair.
_FUSED_ON_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (0, 1.0),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (1, 2.5),  # the pairs are made again
}


class Operations(TorchDispatchMode):
    """Counts multiply-adds of matrix products, convolutions and attention (PyTorch's own formulas, and one for the CPU's
    fused attention, which has none)."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.count += formula(*args, **(kwargs or {}), out_val=out) / 2
        elif func._overloadpacket in _FUSED_ON_CPU:
            first, times = _FUSED_ON_CPU[func._overloadpacket]
            query, key, value = args[first : first + 3]
            self.count += times * query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])
        return out


@contextlib.contextmanager
def count_kept_bytes(*ignored: Tensor | nn.Parameter) -> Iterator[list[int]]:
    """Counts what autograd and its Functions hold for backward at a time, ``ignored`` (weights) apart; gives a list of the
    most bytes."""
    apart = {tensor.untyped_storage()._cdata for tensor in ignored}
    holders: dict[int, int] = {}
    now, most = [0], [0]

    class Kept:
        def __init__(self, tensor: Tensor) -> None:
            # Detached: an operation's own output would keep its graph alive, which would keep this, which would keep it.
            self.tensor, self.storage = tensor.detach(), tensor.untyped_storage()
            self.count(1)
            most[0] = max(most[0], now[0])

        def __del__(self) -> None:
            self.count(-1)

        def count(self, change: int) -> None:
            key = self.storage._cdata
            before = holders.get(key, 0)
            holders[key] = before + change
            if key not in apart and 0 in (before, holders[key]):
                now[0] += change * self.storage.nbytes()

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        yield most
