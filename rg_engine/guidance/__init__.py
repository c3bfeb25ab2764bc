"""Targets, their loss, when to guide, and how the latent moves."""

from .objective import Branch, Objective, SourceStep
from .parts import Part, parts_of
from .schedule import GuidanceSettings, Plan, make_plan
from .targets import Target, chain
from .updates import ReferenceUpdate, norm_ratio_length, rms_step

__all__ = [
    "Branch",
    "GuidanceSettings",
    "Objective",
    "Part",
    "Plan",
    "ReferenceUpdate",
    "SourceStep",
    "Target",
    "chain",
    "make_plan",
    "norm_ratio_length",
    "parts_of",
    "rms_step",
]
