"""The nodes: schemas and validation; the work is done one floor down."""

from . import (
    boundaries,
    crops,
    demo,
    heads,
    inversion,
    keyframes,
    oft,
    oft_training,
    optimization,
    picture_losses,
    points,
    sampling,
    targets,
    training,
)  # fmt: skip

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
    *optimization.NODES,
    *picture_losses.NODES,
    *boundaries.NODES,
    *oft.NODES,
    *oft_training.NODES,
)
