"""Follow Crops."""

from __future__ import annotations

from comfy_api.latest import io

from ..rg_engine.guidance.crop_marks import mark
from .schema import schema


class FollowCropsNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "RG_FollowCrops",
            "Follow Crops",
            aliases=["detailer", "tiled upscale", "ultimate sd upscale", "face detailer", "tiles", "crop"],
            description="For detailers and tiled upscalers, which sample crops of a picture: put it on their positive "
            "prompt, last, and give them a guided model. Guidance then compares each crop with its own part of the "
            "control picture, instead of squeezing all of the control into every crop. The prompt itself works as before.",
            inputs=[
                io.Conditioning.Input("positive", tooltip="The prompt of the detailer or upscaler, without masks or areas."),
                io.Image.Input(
                    "image", tooltip="The picture that is detailed or upscaled. Only its size counts: crops are told by it."
                ),
            ],
            outputs=[io.Conditioning.Output("CONDITIONING", tooltip="For positive of the detailer or upscaler.")],
        )

    @classmethod
    def execute(cls, positive, image) -> io.NodeOutput:
        return io.NodeOutput(mark(positive, (image.shape[1], image.shape[2])))


NODES = (FollowCropsNode,)
