"""The nodes: schemas and validation; the work is done one floor down."""

from . import crops, demo, heads, inversion, keyframes, oft, oft_training, points, sampling, targets, training

NODES = (
    *heads.NODES,
    *targets.NODES,
    *points.NODES,
    *sampling.NODES,
    *inversion.NODES,
    *training.NODES,
    *demo.NODES,
    *keyframes.NODES,
    *crops.NODES,
    *oft.NODES,
    *oft_training.NODES,
)
