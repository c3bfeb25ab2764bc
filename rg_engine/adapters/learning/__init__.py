"""Trains orthogonal adapters: what learns, on what, and how."""

from .examples import AdapterExamples, Noisy
from .settings import LAYERS, OftSettings
from .task import AdapterTraining
from .turns import Turns

__all__ = ["LAYERS", "AdapterExamples", "AdapterTraining", "Noisy", "OftSettings", "Turns"]
