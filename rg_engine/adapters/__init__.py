"""Orthogonal adapters (OFT, COFT, BOFT; Qiu et al., arXiv 2306.07280): their maths, the layouts of their files, energy."""

from .adapter import CONVENTIONS, Adapter, Convention, Layer, ReadOptions
from .files import load_adapter
from .rotation import Rotation, turn

__all__ = ["CONVENTIONS", "Adapter", "Convention", "Layer", "ReadOptions", "Rotation", "load_adapter", "turn"]
