"""Trains readout heads on a frozen model: features without a graph, only the head learns."""

from .loop import HeadTraining, train_heads
from .losses import balanced_mse

__all__ = ["HeadTraining", "balanced_mse", "train_heads"]
