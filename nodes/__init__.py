"""The nodes: schemas and validation; the work is done one floor down."""

from . import demo, heads, points, sampling, targets

NODES = (*heads.NODES, *targets.NODES, *points.NODES, *sampling.NODES, *demo.NODES)
