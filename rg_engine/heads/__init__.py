"""Readout heads as modules, and their file formats."""

from .aggregation import AggregationNetwork
from .files import HeadSpec, ReadoutHead, load_head, save_head, to_authors_layout

__all__ = ["AggregationNetwork", "HeadSpec", "ReadoutHead", "load_head", "save_head", "to_authors_layout"]
