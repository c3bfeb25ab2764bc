"""Readout heads as modules, and their file formats."""

from .aggregation import AggregationNetwork
from .authors import to_authors_layout
from .files import load_head, save_head
from .head import HeadSpec, ReadoutHead

__all__ = ["AggregationNetwork", "HeadSpec", "ReadoutHead", "load_head", "save_head", "to_authors_layout"]
