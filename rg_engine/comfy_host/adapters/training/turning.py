"""A frozen network whose layers' inputs are turned: for training, its weights are never touched, so that fp8, quantised,
offloaded and LoRA-patched models learn alike."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import torch
from comfy.ldm.modules.attention import BasicTransformerBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ....adapters.learning import LAYERS, Noisy, OftSettings, Turns
from ....adapters.learning.turns import turned_input
from ....errors import TrainingError
from ...guided.attention import ATTENTION
from ...loaded.frozen_layers import is_known, plain
from ...loaded.frozen_model import FrozenModel
from ...loaded.gradient_scope import GradientScope, Graph
from ...loaded.model import known_backbone
from ...loaded.saved_tensors import beside_other_nodes
from ..names import MODEL


def trainable(network: nn.Module, layers: str) -> dict[str, int]:
    """Layers that can learn, by their keys in the model, and how wide their inputs are. Raises TrainingError if there are
    none.

    Linear layers and convolutions of 1x1: any other convolution turns what its kernel sees, not its input.
    """
    found = {}
    for name, module in network.named_modules():
        width = _width(module)
        if width and re.search(LAYERS[layers], f".{name}"):
            found[f"{MODEL}{name}"] = width
    if not found:
        raise TrainingError(
            f"this model has no layers of the kind {layers!r} that can be turned: choose another of {', '.join(LAYERS)}"
        )
    return found


def new_turns(network: nn.Module, settings: OftSettings) -> tuple[Turns, list[str]]:
    """Turns that change nothing yet, and what was not as asked: block sizes that don't divide a layer."""
    blocks = {key: settings.divided(width) for key, width in trainable(network, settings.layers).items()}
    wanted = f"blocks of {settings.block_size}" if settings.block_size else f"{settings.blocks} blocks"
    other = {
        f"{n} blocks of {b}"
        for n, b in blocks.values()
        if (b != settings.block_size if settings.block_size else n != settings.blocks)
    }
    notes = [f"{wanted} don't divide every layer: some have {', '.join(sorted(other))}"] if other else []
    return Turns(blocks, settings.coft_eps), notes


class TurnedModel:
    """The model's loss with turns in force. Open while it is used; everything is as before when it closes, also after an
    error."""

    def __init__(self, frozen: FrozenModel, graph: Graph) -> None:
        self._frozen, self._light = frozen, graph == "light"
        self._scope = GradientScope(frozen.network, backbone=known_backbone(frozen.network))
        self._layers = [(f"{MODEL}{name}", module) for name, module in frozen.network.named_modules() if _width(module)]
        self._in_force: dict[str, Any] = {}  # by layer, now
        self._open = contextlib.ExitStack()

    def __enter__(self) -> TurnedModel:
        try:
            self._open.enter_context(self._scope)
            for key, layer in self._layers:
                self._open.callback(self._attach(key, layer).remove)
            for block in self._frozen.network.modules() if self._light else ():
                if isinstance(block, BasicTransformerBlock):
                    self._open.enter_context(_checkpointed(block))
        except BaseException:
            self._open.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()
        self._in_force.clear()

    def loss(self, turns: Turns, noisy: Noisy, of_class: bool) -> Tensor:
        """(n,): the squared error of what the network predicts (noise, v, a flow's velocity: whatever this one does)."""
        self._in_force = self._now(turns)
        caught: list[Tensor] = []

        def through(executor: Any, *args: Any, **kwargs: Any) -> Tensor:
            with beside_other_nodes(self._scope.writes):
                caught.append(executor(*plain(args), **plain(kwargs)))
            return caught[0].detach()

        noised = self._frozen.call(
            noisy.latents, noisy.noise, noisy.time, through, prompt="class" if of_class else "positive",
            pictures=noisy.pictures, attention=ATTENTION["full"],
        )  # fmt: skip
        denoised, zeros = self._frozen.model_sampling.calculate_denoised, torch.zeros_like(noised.x)
        units = denoised(noised.sigma, zeros + 1, zeros) - denoised(noised.sigma, zeros, zeros)  # of what is predicted
        with torch.autocast(zeros.device.type, enabled=False):
            return ((caught[0].float() - noised.clean) / units).square().flatten(1).mean(1)

    def sample(self, turns: Turns, noise: Tensor, steps: int, cfg: float, prompt: str = "positive") -> Tensor:
        """Latents made with the turns in force."""
        with torch.no_grad():
            self._in_force = self._now(turns)
            return self._frozen.sample(noise, steps, cfg, prompt)

    def _now(self, turns: Turns) -> dict[str, Any]:
        with torch.autocast(self._frozen.device.type, enabled=False):
            return turns.in_force()

    def _attach(self, key: str, layer: nn.Module) -> Any:
        """What the layer does otherwise while turns are in force; a handle to remove it by."""
        channels_first = not _is_linear(layer)

        def turn(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            rotation = self._in_force.get(key)
            if rotation is None:
                return None
            with torch.autocast(rotation.device.type, enabled=False):
                return turned_input(args[0], rotation, channels_first), *args[1:]

        return layer.register_forward_pre_hook(turn)


@contextlib.contextmanager
def _checkpointed(block: nn.Module) -> Iterator[None]:
    """A transformer block that keeps its input only, and runs again in backward."""
    own, original = block.__dict__.get("forward"), block.forward

    def forward(x: Tensor, context: Any = None, transformer_options: dict[str, Any] | None = None) -> Tensor:
        options = dict(transformer_options or {})  # as it is now: the network changes it from block to block
        return checkpoint(lambda inner: original(inner, context, dict(options)), x, use_reentrant=False)

    block.__dict__["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del block.__dict__["forward"]
        else:
            block.__dict__["forward"] = own


def _is_linear(module: Any) -> bool:
    return hasattr(module, "in_features")


def _width(module: Any) -> int:
    """How wide a layer's input is, 0 for what can't be turned."""
    if not getattr(module, "_parameters", None) or getattr(module, "weight", None) is None:
        return 0
    if isinstance(module, nn.Conv2d):
        pointwise = module.kernel_size == (1, 1) and module.groups == 1
        return module.in_channels if pointwise and is_known(module) else 0
    return int(module.in_features) if _is_linear(module) else 0
