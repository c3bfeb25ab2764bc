"""Trains readout heads on a frozen model: features without a graph, only the head learns."""

from .data.draws import Draw, Reading
from .data.examples import Examples, in_a_row
from .head_training import HeadTraining
from .lessons import Lesson, lesson_of
from .loop import Progress
from .new_head import new_head
from .settings import TrainingSettings

__all__ = [
    "Draw",
    "Examples",
    "HeadTraining",
    "Lesson",
    "Progress",
    "Reading",
    "TrainingSettings",
    "in_a_row",
    "lesson_of",
    "new_head",
]
