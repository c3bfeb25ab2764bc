"""What every combination is tried on: the demo model, scenes to follow, the estimator, and ComfyUI's own sampler nodes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...comfy_host.guided.model import guide
from ...comfy_host.loaded.readout import read_out
from ...demo.measure import control_errors
from ...demo.scene_pictures import ScenePictures, scene_pictures
from ...guidance import GuidanceSettings, Target
from ...heads import ReadoutHead
from ..demo_world import World, demo_head, load_world
from ..steering import SCENE_SEED
from .loading import has_node, node

STEPS, CFG, SEED = 20, 3.0, 100
PROMPT = "a red figure, grey wall"
#: Gives a model back guided, or as it was: (model, target) -> model. Without a target, the bench's own.
Guide = Callable[..., Any]


def guided(model: Any, target: Target, settings: GuidanceSettings) -> Any:
    """The one place where combinations apply guidance: a guided clone of ``model``."""
    return guide(model, target, settings)


def following_crops(positive: Any, picture: Tensor) -> Any:
    """A prompt under which controls follow crops of ``picture`` (B, H, W, 3), where this extension has a node for it."""
    return node("RG_FollowCrops", positive=positive, image=picture) if has_node("RG_FollowCrops") else positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """folder: where the packs are. wanted: the scenes whose poses are followed, one a picture."""

    world: World
    head: ReadoutHead
    wanted: ScenePictures
    folder: Path | None

    @property
    def model(self) -> Any:
        return self.world.model

    @property
    def pictures(self) -> int:
        return len(self.wanted.scenes)

    @property
    def positive(self) -> Any:
        return self.prompt(PROMPT)

    @property
    def negative(self) -> Any:
        return self.prompt("")

    def prompt(self, text: str) -> Any:
        """CONDITIONING of a text."""
        return node("CLIPTextEncode", clip=self.world.clip, text=text)

    def target(self, only: int | None = None, **inputs: Any) -> Target:
        """The pose of every scene, or of one."""
        image = self.wanted.pose if only is None else self.wanted.pose[only : only + 1]
        return Target(head=self.head, **{"image": image, **inputs})

    def latent(self, pictures: int | None = None, cells: int = 16) -> dict[str, Any]:
        return {"samples": torch.zeros(self.pictures if pictures is None else pictures, 8, cells, cells)}

    def ksampler(self, model: Any, **inputs: Any) -> Tensor:
        """The finished latents of ComfyUI's KSampler."""
        given = {"seed": SEED, "steps": STEPS, "cfg": CFG, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0,
                 "positive": self.positive, "negative": self.negative, "latent_image": self.latent()}  # fmt: skip
        return node("KSampler", model=model, **{**given, **inputs})["samples"]

    def sigmas(self, model: Any, scheduler: str = "normal", steps: int = STEPS) -> Tensor:
        return node("BasicScheduler", model=model, scheduler=scheduler, steps=steps, denoise=1.0)

    def custom(self, guider: Any, sampler: Any = "euler", sigmas: Tensor | None = None, **inputs: Any) -> Tensor:
        """The finished latents of SamplerCustomAdvanced; sampler: a name or a SAMPLER."""
        given = {"noise": node("RandomNoise", noise_seed=SEED), "guider": guider, "latent_image": self.latent(),
                 "sampler": node("KSamplerSelect", sampler_name=sampler) if isinstance(sampler, str) else sampler,
                 "sigmas": self.sigmas(self.model) if sigmas is None else sigmas}  # fmt: skip
        return node("SamplerCustomAdvanced", **{**given, **inputs})[0]["samples"]

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (B, H, W, 3) in 0..1."""
        return self.world.vae.decode(latents).clamp(0, 1).cpu()

    def encode(self, pictures: Tensor) -> Tensor:
        return self.world.vae.encode(pictures)

    def pose_error(self, pictures: Tensor) -> float:
        """Mean distance of joints in finished pictures from the scenes', in px of 128: larger pictures are shrunk."""
        if pictures.shape[1] != 128:
            pictures = F.interpolate(pictures.movedim(-1, 1), (128, 128), mode="area").movedim(1, -1)
        return float(control_errors("pose", pictures, self.wanted.scenes[: len(pictures)], self.world.estimator).mean())

    def readout_error(self, latents: Tensor) -> float:
        """Mean square difference of the head's readout of finished latents from the control."""
        readout, _ = read_out(self.model, self.head, {"samples": latents}, 0.1, self.positive, 0)
        control = self.target(image=self.wanted.pose[: len(latents)])
        wanted = control.control((latents.shape[-2], latents.shape[-1]), len(latents), readout.device)
        assert wanted is not None
        return float((readout - wanted).square().mean())


def make_bench(pictures: int, folder: Path | None) -> Bench:
    with torch.inference_mode(False):
        head = demo_head("demo_pose")
    wanted = scene_pictures(SCENE_SEED + 1, pictures, figure_only=True)
    return Bench(world=load_world(pictures), head=head, wanted=wanted, folder=folder)
