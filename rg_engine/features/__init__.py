"""Where to tap which backbone, and the tap."""

from .backbones import check_head_fits, detect_backbone
from .contract import Backbone
from .tap import FeatureTap

__all__ = ["Backbone", "FeatureTap", "check_head_fits", "detect_backbone"]
