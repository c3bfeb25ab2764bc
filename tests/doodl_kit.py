"""The DOODL kit: the authors' figures, and stand-ins for VAE, CLIP and classifier as its README describes them.

Another kit of the same layout is tried by naming its folder in DOODL_KIT.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from comfyui_host import engine
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn import functional as F

KIT = Path(os.environ.get("DOODL_KIT", Path(__file__).parent / "parity" / "doodl"))
LATENT_SCALE = 0.18215
CELLS = 8


def unet_config() -> dict[str, Any]:
    return json.loads((KIT / "unet_config.json").read_text())["unet_config"]


def comfyui_model() -> Any:
    """The kit's network as ComfyUI's own model, in fp32."""
    import comfy.supported_models

    model = comfy.supported_models.SD15(unet_config()).get_model({}, "")
    model.diffusion_model.load_state_dict({k: v.float() for k, v in load_file(KIT / "unet.safetensors").items()})
    model.diffusion_model.float().requires_grad_(False)
    return model


class Kit:
    """golden(key), settings, and what the authors' run was made of."""

    @torch.inference_mode(False)
    def __init__(self) -> None:
        with safe_open(KIT / "golden.safetensors", framework="pt") as file:
            self.settings = json.loads(file.metadata()["settings"])
        self.tensors = load_file(KIT / "golden.safetensors")
        self.cfg, self.p, self.factor = (self.settings[name] for name in ("cfg", "p", "factor"))

    def __call__(self, key: str) -> torch.Tensor:
        return self.tensors[key]

    @property
    def runs(self) -> list[str]:
        return list(self.settings["runs"])

    def run(self, name: str) -> SimpleNamespace:
        """A run's settings, the authors' defaults where it does not say."""
        given = {
            "grad_scale": 1.0, "clip_grad_val": 1e-3, "perturb_grad_scale": 1e-4, "use_nesterov": False,
            "tied_latents": True, "renormalize_latents": True, "optimize_first_edict_image_only": False, "opt_t": None,
            "single_variable": False, "use_cutouts": False, **self.settings["runs"][name],
        }  # fmt: skip
        return SimpleNamespace(**given)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents at the VAE's scale (B, 4, h, w) to pictures (B, 3, f h, f w) in -1..1."""
        weight, bias = (self(f"dec.{name}").to(latents) for name in ("weight", "bias"))
        return F.pixel_shuffle(F.conv2d(latents, weight[:, :, None, None], bias), self.factor)

    def images(self, z: torch.Tensor) -> torch.Tensor:
        return self.decode(z / LATENT_SCALE)

    def embed(self, name: str):
        pixels = engine("optimization.pixels")

        def embed(view: torch.Tensor) -> torch.Tensor:
            averages = F.adaptive_avg_pool2d(pixels.normalised(view, pixels.CLIP_MEAN, pixels.CLIP_STD), CELLS).flatten(1)
            return averages @ self(f"feat.{name}").to(view).T

        return embed

    def classify(self, normalised: torch.Tensor) -> torch.Tensor:
        averages = F.adaptive_avg_pool2d(normalised, CELLS).flatten(1)
        return F.linear(averages, self("cls.weight").to(averages), self("cls.bias").to(averages))

    def aesthetic(self, name: str) -> Any:
        layers = {key: self(f"aes.{name}.{key}") for key in ("weight", "bias")}
        return engine("optimization.losses").aesthetic_head(layers, name)

    def measure(self, kind: str, crops: Any, size: int = 224) -> Any:
        """The loss of a kind, looking at these crops; a function of images and a generator."""
        losses = engine("optimization.losses")
        if kind == "clip_text":
            return losses.ClipLoss(embed=self.embed("vit_g_14"), wanted=self("feat.text"), crops=crops, over="min")
        if kind == "clip_image":
            embed = self.embed("vit_b_32")
            picture = (self("clip_image.picture") / 255)[None]
            wanted = losses.mean_feature(embed(F.interpolate(picture, (224, 224), mode="bilinear")))
            return losses.ClipLoss(embed=embed, wanted=wanted, crops=crops, over="min")
        if kind == "fgvc":
            label = next(run["model_guidance_dict"]["class"] for run in self.settings["runs"].values()
                         if run["model_guidance_type"] == "fgvc")  # fmt: skip
            return losses.ClassifierLoss(network=self.classify, label=label, crops=crops)
        if kind in ("aesthetic", "aesthetic_target"):
            target = 10.0 if kind == "aesthetic_target" else 0.0
            parts = {
                name: losses.AestheticLoss(
                    embed=self.embed(name), head=self.aesthetic(name), target=target, crops=crops, clamped=True
                )
                for name in ("vit_l_14", "vit_b_32")
            }
            if target:
                return parts["vit_l_14"]
            runs = self.settings["runs"].values()
            weights = next(r["model_guidance_dict"]["weights"] for r in runs if r["model_guidance_type"] == "aesthetic")
            return lambda images, g: sum(w * part(images, g) for w, part in zip(weights, parts.values(), strict=True)) / 2
        return losses.symmetry_loss


def crops_at(boxes: torch.Tensor | None, size_px: int = 224) -> Any:
    """Crops that are where the authors' were: boxes (n, 3) of (size, x, y)."""
    pixels = engine("optimization.pixels")
    if boxes is None:
        return pixels.Crops(size_px=size_px)

    class Recorded(pixels.Crops):
        def boxes(self, *_: Any) -> list[tuple[int, int, int]]:
            return [tuple(int(v) for v in box) for box in boxes]

    return Recorded(count=len(boxes), size_px=size_px)


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-30))
