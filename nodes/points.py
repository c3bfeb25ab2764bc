"""Drag Points."""

from __future__ import annotations

import torch
from comfy_api.latest import io, ui

from ..rg_engine.errors import TargetError
from ..rg_engine.guidance.points import draw_drags, parse_drags
from ..rg_engine.types import DragPoints
from .schema import DragPoints as DragPointsType
from .schema import schema


class DragPointsNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "RG_DragPoints",
            "Drag Points",
            aliases=["drag", "arrows", "points editor", "draggan", "dragdiffusion"],
            is_output_node=True,  # so that its picture is there to draw on when nothing comes after it
            description="Arrows that say what moves where, for a Readout Target with a correspondence head.",
            inputs=[
                io.Image.Input("image", optional=True, tooltip="The picture to draw the arrows on."),
                io.String.Input(
                    "points", multiline=True, default='{"version": 1, "drags": []}',
                    tooltip='JSON: {"version": 1, "drags": [{"from": [x, y], "to": [x, y]}]}, x and y in 0..1, y down.',
                ),
                io.Int.Input(
                    "frames", default=1, min=1, max=1000, optional=True,
                    tooltip="The drag in so many steps: a picture each, to be played as an animation.",
                ),
            ],
            outputs=[
                DragPointsType.Output("DRAG_POINTS"),
                io.Image.Output("preview", display_name="preview", tooltip="The picture with the arrows drawn."),
            ],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, points: str) -> bool | str:
        if points is None:  # comes over a link; checked when it runs
            return True
        try:
            parse_drags(points)
        except TargetError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, points: str, image=None, frames: int = 1) -> io.NodeOutput:
        drags = parse_drags(points)
        if image is None:
            blank = torch.full((1, 512, 512, 3), 0.25)
            return io.NodeOutput(DragPoints(drags=drags, frames=frames), draw_drags(drags, blank))
        # For the editor, without arrows; under a name of our own, or ComfyUI would show it below the editor as well.
        shown = {"drag_picture": ui.PreviewImage(image[:1]).values}
        aspect = image.shape[2] / image.shape[1]
        return io.NodeOutput(DragPoints(drags=drags, frames=frames, aspect=aspect), draw_drags(drags, image), ui=shown)


NODES = (DragPointsNode,)
