"""How many kernels a step launches, and how long Python takes for them: what binds where a network is small beside its GPU.

Every operation that computes something is a launch; they are the same on every device, but for larger heads, whose
bottlenecks run one by one. Host time is that of a network so small that
nothing else takes any, on a CPU.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import torch
from comfy.ldm.modules.attention import BasicTransformerBlock
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ...guidance import GuidanceSettings, Target
from .models import SD15, Shape, random_conds, random_heads, random_model, random_target, zero_latent
from .timing import EVERY_STEP, WITH_NEGATIVE, median_ratio, model_calls

#: SD1.5's layers, all of them, as narrow as their norms allow.
TINY = Shape(config={**SD15, "model_channels": 32, "context_dim": 32, "num_heads": 4}, cells=8, projection=128)
#: Views that are none by name, memory that is not filled, what an evaluated network leaves out, numbers.
NOTHING = ("_unsafe_view", "empty", "empty_like", "new_empty", "set_", "detach", "lift_fresh", "dropout", "scalar_tensor")
STEPS = 10  # of a run; a step is short enough that its move needs no second prediction


class Launches(TorchDispatchMode):
    """Counts launches by where they happen: in the network's forward, in a block of it, in backward, or elsewhere."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self._inside = 0
        self._handles = [
            network.register_forward_pre_hook(lambda *_: self._enter(1)),
            network.register_forward_hook(lambda *_: self._enter(-1), always_call=True),
        ]

    def _enter(self, change: int) -> None:
        self._inside += change

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not (func.is_view or func.overloadpacket.__name__ in NOTHING):
            backward = torch._C._current_graph_task_id() != -1
            self.found["backward" if backward else "forward" if self._inside else "rest"] += 1
        return func(*args, **(kwargs or {}))

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for handle in self._handles:
            handle.remove()


def step_launches(model: Any, target: Target | None, settings: GuidanceSettings, conds: Any, latent: Tensor) -> Counter[str]:
    """Of the third step of a run: all that happens in the sampler's one model call."""
    found: list[Counter[str]] = []

    def count(executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        with Launches(model.model.diffusion_model) as launches:
            out = executor(*args, **kwargs)
        found.append(launches.found)
        return out

    counted = model.clone()
    counted.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "launches", count)
    model_calls(counted, target, settings, conds, latent, steps=STEPS)
    return found[2]


def block_launches(network: nn.Module) -> int:
    """Of one transformer block, one branch."""
    block = next(module for module in network.modules() if isinstance(module, BasicTransformerBlock))
    width, context = block.norm1.weight.numel(), block.attn2.to_k.in_features
    with Launches(block) as launches:
        block(torch.zeros(1, 64, width), torch.zeros(1, 77, context))
    return launches.found["forward"]


@torch.inference_mode()
def launches_table(turns: int) -> list[dict[str, Any]]:
    """A row a way of making a step with two prompts: launches in the network's forward passes, in backward and beside them,
    and host time over a plain step's."""
    model = random_model(TINY, torch.float32)
    conds = tuple(random_conds(model, TINY, seed) for seed in (1, 2))
    latent = zero_latent(TINY, 1)
    target = random_target(random_heads(model, TINY, 1), latent, end_percent=1.0)
    ways: dict[str, tuple[Target | None, GuidanceSettings]] = {
        "plain": (None, EVERY_STEP), "no move at this step": (target, GuidanceSettings(strength=0.0)),
        "fast": (target, EVERY_STEP),
        "fast, the gradient alone": (target, dataclasses.replace(EVERY_STEP, feature_steps=1)),
        "fast, with the negative prompt": (target, WITH_NEGATIVE),
        "reference": (target, GuidanceSettings(mode="reference")),
    }  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(turns + 1):
        for name, (wanted, settings) in ways.items():
            times = model_calls(model, wanted, settings, conds, latent, steps=STEPS)[1:4]
            seconds[name] += times if turn else []
    rows = []
    for name, (wanted, settings) in ways.items():
        found = step_launches(model, wanted, settings, conds, latent)
        of_a_step = {key: found[key] for key in ("forward", "backward", "rest")}
        rows.append({"a step": name, **of_a_step, "host time": median_ratio(seconds[name], seconds["plain"])})
    block = {"forward": block_launches(model.model.diffusion_model), "backward": 0, "rest": 0, "host time": ""}
    return [*rows, {"a step": "one transformer block", **block}]
