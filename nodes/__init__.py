"""The nodes: schemas and validation; the work is done one floor down."""

from . import demo, heads, points, sampling, targets, training

NODES = (*heads.NODES, *targets.NODES, *points.NODES, *sampling.NODES, *training.NODES, *demo.NODES)
