"""Targets, their loss, when to guide, and how the latent moves."""

from .crop_marks import coordinate_mask, crop_of, read_crop
from .keyframes import Keyframes
from .objective import Branch, Objective, SourceStep
from .parts import Part, parts_of
from .schedule import GuidanceSettings, Plan, make_plan
from .targets import Target, chain
from .updates import ReferenceUpdate, norm_ratio_length, rms_step

__all__ = [
    "Branch",
    "GuidanceSettings",
    "Keyframes",
    "Objective",
    "Part",
    "Plan",
    "ReferenceUpdate",
    "SourceStep",
    "Target",
    "chain",
    "coordinate_mask",
    "crop_of",
    "make_plan",
    "norm_ratio_length",
    "parts_of",
    "read_crop",
    "rms_step",
]
