"""Where to tap which backbone, and the tap."""

from .backbones import Backbone, check_head_fits, detect_backbone
from .tap import FeatureTap

__all__ = ["Backbone", "FeatureTap", "check_head_fits", "detect_backbone"]
