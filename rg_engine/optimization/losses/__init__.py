"""Losses of finished pictures, one file each: functions of pictures (B, 3, H, W) in -1..1, to (B,)."""

from .aesthetic import AestheticHead, AestheticLoss, aesthetic_head
from .classifier import Classifier, ClassifierLoss, load_classifier
from .clip import ClipLoss, mean_feature, spherical_distance
from .likeness import LikenessLoss
from .palette import PaletteLoss
from .symmetry import symmetry_loss

__all__ = [
    "AestheticHead",
    "AestheticLoss",
    "Classifier",
    "ClassifierLoss",
    "ClipLoss",
    "LikenessLoss",
    "PaletteLoss",
    "aesthetic_head",
    "load_classifier",
    "mean_feature",
    "spherical_distance",
    "symmetry_loss",
]
