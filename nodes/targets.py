"""Readout Target."""

from __future__ import annotations

from comfy_api.latest import io

from ..rg_engine.guidance import Target
from ..rg_engine.guidance.pictures import without_frames
from .schema import DragPoints, Readout, ReadoutHead, ReadoutKeyframes, ReadoutTarget, schema


class ReadoutTargetNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "RG_ReadoutTarget",
            "Readout Target",
            aliases=["readout guidance", "control target", "pose control", "depth control", "drag"],
            description="What the picture should read like. A spatial head needs image (a pose, depth or edge map), a "
            "correspondence head drag_points, a keypoint head readout (what Read Out made), an lgp head "
            "reference_latent (the edge map through VAE Encode); an appearance head takes reference_latent or, without "
            "one, keeps the look of the unguided picture. Chain several through previous.",
            inputs=[
                ReadoutHead.Input("head", tooltip="What reads the picture."),
                io.Float.Input(
                    "weight", default=1.0, min=0.0, max=100.0, step=0.001,
                    tooltip="Balances several targets. How far the picture moves is set by the sampler's strength.",
                ),
                io.Float.Input("start_percent", default=0.0, min=0.0, max=1.0, step=0.01, tooltip="Guide from here ..."),
                io.Float.Input(
                    "end_percent", default=0.5, min=0.0, max=1.0, step=0.01,
                    tooltip="... to here, as parts of the diffusion time (as on ControlNet). Layout is made in the "
                    "first half; later guidance holds details but costs quality.",
                ),
                io.Image.Input("image", optional=True, tooltip="The control picture, of any size; cropped to the aspect."),
                io.Mask.Input(
                    "mask", optional=True,
                    tooltip="Where the target counts (white). With drags: what may move; the rest stays as in the "
                    "picture without drags.",
                ),
                DragPoints.Input("drag_points", optional=True, tooltip="Arrows from Drag Points."),
                io.Latent.Input(
                    "reference_latent", optional=True,
                    tooltip="The picture whose look to keep; for an lgp head the encoded edge map.",
                ),
                ReadoutTarget.Input("previous", optional=True, tooltip="Another target to follow as well."),
                Readout.Input(
                    "readout", optional=True, tooltip="What the head reads in another picture (Read Out), instead of image."
                ),
                io.Mask.Input(
                    "reference_mask", optional=True,
                    tooltip="For an appearance head: what in reference_latent to keep, wherever it stands. mask is "
                    "then where it should be found.",
                ),
                ReadoutKeyframes.Input(
                    "keyframes", optional=True,
                    tooltip="Weight over the diffusion time, from Readout Keyframes; multiplies weight.",
                ),
            ],
            outputs=[ReadoutTarget.Output("TARGET", display_name="READOUT_TARGET")],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, start_percent: float, end_percent: float) -> bool | str:
        if start_percent is not None and end_percent is not None and start_percent >= end_percent:
            return f"start_percent {start_percent:g} is not before end_percent {end_percent:g}: the target would never guide"
        return True

    @classmethod
    def execute(
        cls, head, weight, start_percent, end_percent, image=None, mask=None, drag_points=None, reference_latent=None,
        previous=None, readout=None, reference_mask=None, keyframes=None,
    ) -> io.NodeOutput:  # fmt: skip
        return io.NodeOutput(
            Target(
                head=head,
                weight=weight,
                start_percent=start_percent,
                end_percent=end_percent,
                image=image,
                mask=mask,
                drags=None if drag_points is None else drag_points.drags,
                frames=1 if drag_points is None else drag_points.frames,
                drag_aspect=None if drag_points is None else drag_points.aspect,
                reference_latent=None if reference_latent is None else without_frames(reference_latent["samples"]),
                readout=readout,
                reference_mask=reference_mask,
                previous=previous,
                keyframes=keyframes,
            )
        )


NODES = (ReadoutTargetNode,)
