"""Readout heads as modules, and their file formats."""

from .aggregation import AggregationNetwork
from .authors import to_authors_layout
from .files import convert_authors, convert_to_authors, load_head, save_head
from .head import HeadSpec, ReadoutHead
from .pixel import PixelNetwork

__all__ = [
    "AggregationNetwork",
    "HeadSpec",
    "PixelNetwork",
    "ReadoutHead",
    "convert_authors",
    "convert_to_authors",
    "load_head",
    "save_head",
    "to_authors_layout",
]
