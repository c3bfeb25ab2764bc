"""Where to tap which backbone, and the tap."""

from .backbones import detect_backbone
from .contract import Backbone, check_head_fits
from .tap import FeatureTap

__all__ = ["Backbone", "FeatureTap", "check_head_fits", "detect_backbone"]
