"""The demo model and its referee, loaded, for measurements."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ..comfy_host.demo_model import load_demo_model
from ..comfy_host.guided.sampling import guided_ksampler
from ..demo import DEMO_HEADS
from ..demo.estimator import Estimator
from ..demo.measure import load_estimator
from ..guidance import GuidanceSettings, Target
from ..heads import ReadoutHead, load_head


@dataclasses.dataclass(frozen=True, kw_only=True)
class World:
    """model, clip and vae as ComfyUI has them; estimator, the referee; pictures, how many a figure is taken over."""

    model: Any
    clip: Any
    vae: Any
    estimator: Estimator
    pictures: int


def load_world(pictures: int) -> World:
    with torch.inference_mode():
        model, clip, vae = load_demo_model()
    return World(model=model, clip=clip, vae=vae, estimator=load_estimator(), pictures=pictures)


def demo_head(name: str) -> ReadoutHead:
    return load_head(DEMO_HEADS / f"{name}.safetensors")


@torch.inference_mode()
def sample(
    world: World, target: Target | None, start: dict[str, Any], settings: GuidanceSettings | None = None, *, prompt: str,
    seed: int, steps: int = 30, cfg: float = 3.0, sampler_name: str = "euler_ancestral",
) -> Tensor:  # fmt: skip
    """Finished pictures (B, 128, 128, 3) in 0..1 from the latent ``start``, as the example workflows make them."""
    latent = guided_ksampler(
        world.model, target, settings or GuidanceSettings(), seed=seed, steps=steps, cfg=cfg, sampler_name=sampler_name,
        scheduler="normal", denoise=1.0, positive=[[world.clip.encode(prompt), {}]],
        negative=[[world.clip.encode(""), {}]], latent=start,
    )  # fmt: skip
    return world.vae.decode(latent["samples"]).clamp(0, 1).cpu()
