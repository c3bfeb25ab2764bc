"""A ControlNet (Zhang et al., arXiv 2302.05543) for the demo UNet: ComfyUI's own class, trained by the project's loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy.cldm.cldm
import comfy.controlnet
import comfy.model_management
import comfy.ops
import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ...comfy_host.demo_model.unet import UNET_CONFIG, DemoModelConfig, load_unet
from ...errors import TrainingError
from ...training.loop import LoopSettings, Progress, Training
from ..demo_world import encoded
from .pairs import Pairs

PRINT_EVERY = 50
WITHOUT_PROMPT = 0.5  # of the pairs, as in the paper (3.3)
_SHAPE = ("image_size", "in_channels", "model_channels", "num_res_blocks", "channel_mult", "transformer_depth",
          "transformer_depth_middle", "context_dim", "use_spatial_transformer", "legacy", "use_checkpoint",
          "use_linear_in_transformer", "adm_in_channels")  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class ControlSettings:
    """How a ControlNet is trained. The learning rate stays as it is, so that a training can go on with more steps."""

    steps: int
    batch: int = 16
    learning_rate: float = 1e-3

    @property
    def loop(self) -> LoopSettings:
        return LoopSettings(
            steps=self.steps, learning_rate=self.learning_rate, warm_up=30, schedule="constant", ema=0.99, young_ema=True,
            clip=1.0, precision="bf16",
        )  # fmt: skip


def new_controlnet(unet: nn.Module) -> nn.Module:
    """ComfyUI's ControlNet with the encoder of the demo model's UNet, that changes nothing yet: what joins it is zero."""
    network = comfy.cldm.cldm.ControlNet(
        **{name: UNET_CONFIG[name] for name in _SHAPE}, **DemoModelConfig.unet_extra_config, hint_channels=3,
        operations=comfy.ops.disable_weight_init,
    )  # fmt: skip
    for layer in network.input_hint_block:
        if isinstance(layer, nn.Conv2d):
            nn.Conv2d.reset_parameters(layer)
    zero = [network.input_hint_block[-1], *network.zero_convs, network.middle_block_out]
    for parameter in (p for module in zero for p in module.parameters()):
        nn.init.zeros_(parameter)
    theirs = unet.state_dict()
    network.load_state_dict({key: theirs.get(key, value) for key, value in network.state_dict().items()})
    return network


def as_control_net(network: nn.Module) -> Any:
    """A CONTROL_NET, as Load ControlNet gives one."""
    return comfy.controlnet.ControlNet(
        network.eval().requires_grad_(False), load_device=comfy.model_management.get_torch_device()
    )


class ControlTraining:
    """One ControlNet in training on pairs, beside a frozen UNet; goes on from ``out``.state.

    The UNet's own loss: v of VP latents, timesteps spread over 0..999.
    """

    def __init__(self, pairs: Pairs, clip: Any, settings: ControlSettings, out: Path) -> None:
        model, self._device = load_unet("cpu"), comfy.model_management.get_torch_device()
        unet = model.diffusion_model.float().requires_grad_(False)
        self._unet = unet.to(self._device, memory_format=torch.channels_last)
        self._sampling, self._pairs, self._settings, self._out = model.model_sampling, pairs, settings, out
        captions = [scene.caption() for scene in pairs.scenes]
        with torch.inference_mode():
            known = {text: encoded(clip, [text])[0][0] for text in {"", *captions}}
        known = {text: words.clone() for text, words in known.items()}
        self._words, self._empty = torch.cat([known[text] for text in captions]), known[""]  # (N, 16, 96), (1, 16, 96)
        facts = {"pairs": len(pairs), "batch": settings.batch, "learning_rate": settings.learning_rate}
        torch.manual_seed(0)
        self._network = new_controlnet(unet).to(memory_format=torch.channels_last)
        self._training = Training(
            self._network, self._draw, self._losses, settings.loop, name=out.stem, facts=facts, device=self._device,
            checkpoint=out.with_suffix(".state"),
        )  # fmt: skip

    def run(self) -> nn.Module:
        """The ControlNet, which ``out`` has as well."""
        losses: list[float] = []

        def report(progress: Progress) -> None:
            losses.append(progress.loss)
            if progress.step % PRINT_EVERY == 0 or progress.step == progress.steps:
                print(f"{self._out.stem} step {progress.step}: {float(np.mean(losses)):.5f}", flush=True)
                losses.clear()

        self._training.run(report)
        if self._training.step > self._settings.steps:
            raise TrainingError(
                f"{self._out.name!r} has learned for {self._training.step} steps already, more than the "
                f"{self._settings.steps} that were asked for: ask for as many, or choose another folder"
            )
        network = self._training.best()
        weights = {key: value.contiguous() for key, value in network.state_dict().items()}
        save_file(weights, self._out, metadata={"steps": str(self._settings.steps)})
        return network

    @property
    def history(self) -> list[float]:
        """The loss of each step."""
        return [loss for _, loss, _ in self._training.history]

    def _draw(self, step: int) -> Iterator[tuple[Tensor, ...]]:
        count, generator = self._settings.batch, torch.Generator().manual_seed(step)
        rows = torch.randint(len(self._pairs), (count,), generator=generator)
        time = (torch.rand(count, generator=generator) + torch.arange(count)) / count
        t = (time * 1000).long().clamp(max=999)
        untold = (torch.rand(count, generator=generator) < WITHOUT_PROMPT)[:, None, None]
        words = torch.where(untold, self._empty, self._words[rows])
        x0 = self._pairs.latents[rows]
        noise = torch.randn(x0.shape, generator=generator)
        sigma = self._sampling.sigma(t.float())[:, None, None, None]
        a, s = (1 + sigma**2).rsqrt(), sigma * (1 + sigma**2).rsqrt()
        drawn = a * x0 + s * noise, t, words, self._pairs.pictures(rows), a * noise - s * x0
        yield tuple(each.to(self._device) for each in drawn)

    def _losses(self, z: Tensor, t: Tensor, words: Tensor, pictures: Tensor, v: Tensor) -> Tensor:
        control = self._network(x=z, hint=pictures, timesteps=t, context=words)
        return F.mse_loss(self._unet(z, t, context=words, control={"input": [], **control}).float(), v)


@torch.inference_mode(False)
@torch.enable_grad()
def train_controlnet(pairs: Pairs, clip: Any, settings: ControlSettings, out: Path) -> nn.Module:
    """A ControlNet of so many steps, in ``out`` (.safetensors); read from there if it is one."""
    if out.exists():
        with safe_open(out, "pt") as file:
            trained = int(file.metadata()["steps"])
        if trained == settings.steps:
            network = new_controlnet(load_unet("cpu").diffusion_model)
            network.load_state_dict(load_file(out))
            return network
    return ControlTraining(pairs, clip, settings, out).run()
