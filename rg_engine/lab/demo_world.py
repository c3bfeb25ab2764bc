"""The demo model and its referee, loaded, for measurements."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..comfy_host.demo_model import Network, load_demo_model
from ..comfy_host.guided.sampling import guided_ksampler
from ..demo import DEMO_HEADS
from ..demo.estimator import Estimator
from ..demo.measure import load_estimator
from ..guidance import GuidanceSettings, Target
from ..heads import ReadoutHead, load_head


@dataclasses.dataclass(frozen=True, kw_only=True)
class World:
    """The demo model with this network: model, clip and vae as ComfyUI has them; estimator, the referee; pictures, how many
    a figure is taken over."""

    network: Network
    model: Any
    clip: Any
    vae: Any
    estimator: Estimator
    pictures: int

    def head(self, name: str) -> ReadoutHead:
        """The head of this name that was trained on the network."""
        return demo_head(name, self.network)


def demo_head(name: str, network: Network = "UNet") -> ReadoutHead:
    return load_head(head_path(name, network))


def head_path(name: str, network: Network) -> Path:
    """Of the demo head ``demo_...`` for a network."""
    return DEMO_HEADS / f"{name if network == 'UNet' else name.replace('demo_', f'demo_{network}_')}.safetensors"


def load_world(pictures: int, network: Network = "UNet") -> World:
    with torch.inference_mode():
        model, clip, vae = load_demo_model(network)
    return World(
        network=network, model=model, clip=clip, vae=vae, estimator=load_estimator(), pictures=pictures
    )  # fmt: skip


def encoded(clip: Any, captions: list[str]) -> Any:
    """A CONDITIONING of one caption, or with a row a caption."""
    conds = {caption: clip.encode_from_tokens_scheduled(clip.tokenize(caption))[0] for caption in set(captions)}
    return [[torch.cat([conds[caption][0] for caption in captions]), conds[captions[0]][1]]]


@torch.inference_mode()
def sample(
    world: World, target: Target | None, start: dict[str, Any], settings: GuidanceSettings | None = None, *, prompt: str,
    seed: int, steps: int = 30, cfg: float = 3.0, sampler_name: str = "euler_ancestral",
    control: tuple[Any, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Finished pictures (B, 128, 128, 3) in 0..1 from the latent ``start``, as the example workflows make them; ``control``,
    a CONTROL_NET and its pictures."""
    positive, negative = encoded(world.clip, [prompt]), encoded(world.clip, [""])
    if control is not None:
        positive, negative = with_control(positive, negative, *control)
    latent = guided_ksampler(
        world.model, target, settings or GuidanceSettings(), seed=seed, steps=steps, cfg=cfg, sampler_name=sampler_name,
        scheduler="normal", denoise=1.0, positive=positive, negative=negative, latent=start,
    )  # fmt: skip
    return world.vae.decode(latent["samples"]).clamp(0, 1).cpu()


def with_control(positive: Any, negative: Any, control_net: Any, pictures: Tensor) -> Any:
    """Both prompts as ComfyUI's Apply ControlNet gives them, at strength 1."""
    from nodes import ControlNetApplyAdvanced  # ComfyUI's

    return ControlNetApplyAdvanced().apply_controlnet(positive, negative, control_net, pictures, 1.0, 0.0, 1.0)
