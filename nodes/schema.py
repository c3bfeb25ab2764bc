"""What the node files share: the category, this extension's own types, and schemas that older ComfyUIs take too."""

from __future__ import annotations

import dataclasses
from typing import Any

from comfy_api.latest import io

from ..rg_engine.guidance import GuidanceSettings

CATEGORY = "Readout Guidance"

ReadoutHead = io.Custom("READOUT_HEAD")
ReadoutTarget = io.Custom("READOUT_TARGET")
DragPoints = io.Custom("DRAG_POINTS")
Readout = io.Custom("READOUT")
Tracks = io.Custom("TRACKS")
Oft = io.Custom("OFT")
ReadoutKeyframes = io.Custom("READOUT_KEYFRAMES")
PictureLoss = io.Custom("PICTURE_LOSS")
Boundary = io.Custom("BOUNDARY")
BoundaryEditChain = io.Custom("BOUNDARY_EDIT")


def schema(node_id: str, display_name: str, *, aliases: list[str], **fields: Any) -> io.Schema:
    """An io.Schema in this extension's category; search aliases where the running ComfyUI knows them."""
    if "search_aliases" in {field.name for field in dataclasses.fields(io.Schema)}:
        fields["search_aliases"] = aliases
    return io.Schema(node_id=node_id, display_name=display_name, category=CATEGORY, **fields)


def mode_and_strength() -> list[Any]:
    """The inputs that both guided sampler nodes share, in their order."""
    return [
        io.Float.Input(
            "strength", default=1.0, min=0.0, max=10.0, step=0.05,
            tooltip="How far the picture is moved towards the target. 1 is the paper's amount, whatever the number of "
            "steps; 0 is no guidance, the same picture as KSampler's.",
        ),
        io.Combo.Input(
            "mode", options=["fast", "reference", "norm_ratio"], default="fast",
            tooltip="fast: one long move every so often, from the pass that predicts the picture anyway. reference: "
            "the paper's own procedure, a small AdamW step at each step; slower. norm_ratio: as Sketch-Guided "
            "Diffusion, each step moves by a share of the sampler's own step.",
        ),
        io.Int.Input(
            "iterations", default=1, min=1, max=50,
            tooltip="fast: moves in each tenth of the denoising; more, shorter ones follow more exactly, and each takes "
            "about half a step's time. reference: updates a step.",
        ),
        io.Float.Input(
            "source_cfg", default=-1.0, min=-1.0, max=100.0, step=0.1,
            tooltip="cfg of the source, the unguided picture that drag and appearance targets start from. -1: the same cfg.",
        ),
    ]  # fmt: skip


def economy() -> list[Any]:
    """Their last, optional inputs: how much is made of each pass through the network."""
    return [
        io.Int.Input(
            "feature_steps", default=GuidanceSettings.feature_steps, min=1, max=50, optional=True,
            tooltip="fast: how often the head runs at a move, to find where the features should go before the model's one "
            "backward pass. More follow a little better; 1 is the gradient alone. Not for drags and looks.",
        ),
        io.Int.Input(
            "keep_negative", default=GuidanceSettings.keep_negative, min=0, max=50, optional=True,
            tooltip="fast: so many guided steps in a row go without the negative prompt's pass, and take from the step "
            "before what it would say: half a step less each. 0: never. Not for drags.",
        ),
    ]  # fmt: skip


def strength_keyframes() -> Any:
    """An optional input of theirs."""
    return ReadoutKeyframes.Input(
        "keyframes", optional=True, tooltip="Strength over the diffusion time, from Readout Keyframes; multiplies strength."
    )
