"""Readout Keyframes."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..rg_engine.errors import TargetError
from ..rg_engine.guidance.keyframes import INTERPOLATIONS, draw_keyframes, numbers, parse_keyframes, spread
from .schema import ReadoutKeyframes, schema


class ReadoutKeyframesNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "RG_ReadoutKeyframes",
            "Readout Keyframes",
            aliases=["schedule", "curve", "timestep keyframes", "weight over time", "strength over time"],
            is_input_list=True,  # a curve may come as a list of its values, which would run this node once for each
            description="A number that changes over the diffusion time, for a target's weight or a sampler's strength, "
            "which it multiplies: written, or from another node's curve.",
            inputs=[
                io.String.Input(
                    "keyframes", multiline=True, default="0.0: 1.0\n0.5: 0.5",
                    tooltip="A keyframe a line, percent: value. The percent is a part of the diffusion time, 0 to 1, as "
                    "start_percent; with a value for each picture of a batch: 0.5: 1.0, 0.8, 0.2.",
                ),
                io.Combo.Input(
                    "interpolation", options=list(INTERPOLATIONS), default="linear",
                    tooltip="Between two keyframes: linear goes straight, hold stays at the earlier one, ease leaves and "
                    "arrives slowly.",
                ),
                io.Float.Input(
                    "values", optional=True, force_input=True,
                    tooltip="A list of numbers from another node (a curve, a schedule), spread evenly from 0 to 1, instead "
                    "of the text. A single number holds throughout.",
                ),
            ],
            outputs=[
                ReadoutKeyframes.Output("KEYFRAMES", display_name="READOUT_KEYFRAMES"),
                io.Image.Output("preview", display_name="preview", tooltip="The curves, one for each picture."),
            ],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, keyframes: Any) -> bool | str:
        text = _one(keyframes)
        if text is None:  # comes over a link; checked when it runs
            return True
        try:
            parse_keyframes(text)
        except TargetError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, keyframes: Any, interpolation: Any, values: Any = None) -> io.NodeOutput:
        kind = _one(interpolation)
        found = parse_keyframes(_one(keyframes), kind) if values is None else spread(numbers(values), kind)
        return io.NodeOutput(found, draw_keyframes(found))


def _one(given: Any) -> Any:
    """A widget's value, which comes in a list of one."""
    return given[0] if isinstance(given, (list, tuple)) and given else given


NODES = (ReadoutKeyframesNode,)
