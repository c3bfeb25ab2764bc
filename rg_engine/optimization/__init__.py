"""Optimizing the first latent for the finished picture (DOODL, arXiv 2303.13703): losses of pictures, the update, what
keeps the latent noise-like, and coupled latents that can be inverted exactly. Without ComfyUI."""

from .noise_like import Keep, Keeper, statistics
from .picture_loss import Measure, PictureLoss
from .pixels import Crops
from .presets import PRESETS, Preset, preset
from .update import LENGTH, Mode, Updater, UpdateSettings

__all__ = [
    "LENGTH",
    "PRESETS",
    "Crops",
    "Keep",
    "Keeper",
    "Measure",
    "Mode",
    "PictureLoss",
    "Preset",
    "UpdateSettings",
    "Updater",
    "preset",
    "statistics",
]
