"""CLIP Loss, Aesthetic Loss, Classifier Loss, Picture Loss: what Optimize Noise asks of the finished picture."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..rg_engine.comfy_host.folders import find_loss_file, loss_file_version, loss_files
from ..rg_engine.comfy_host.optimized.measured.losses import (
    KINDS,
    aesthetic_measure,
    classifier_measure,
    clip_measure,
    picture_measure,
)
from ..rg_engine.errors import OptimizationError
from ..rg_engine.optimization import PictureLoss as Loss
from .schema import PictureLoss, schema

ALIASES = ["doodl", "optimize noise", "loss", "reward"]


def weight() -> Any:
    return io.Float.Input(
        "weight", default=1.0, min=-1000.0, max=1000.0, step=0.01,
        tooltip="Balances several losses; below 0 the picture moves away from what is asked.",
    )  # fmt: skip


def crops_and_previous() -> list[Any]:
    return [
        io.Int.Input(
            "crops", default=0, min=0, max=256,
            tooltip="Random crops that are looked at in each update, the authors' 16; 0: the whole picture, faster.",
        ),
        io.Float.Input(
            "crop_power", default=0.3, min=0.01, max=10.0, step=0.01,
            tooltip="How large crops are: small numbers give large crops.",
        ),
    ]  # fmt: skip


def previous() -> Any:
    return PictureLoss.Input("previous", optional=True, tooltip="Another loss that counts as well.")


def outputs() -> list[Any]:
    return [PictureLoss.Output("LOSS", display_name="PICTURE_LOSS", tooltip="For Optimize Noise, or the next loss.")]


class ClipLossNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "RG_ClipLoss",
            "CLIP Loss",
            aliases=[*ALIASES, "clip guidance", "style", "personalisation"],
            description="How far the finished picture is from a text, or from other pictures, as CLIP sees them.",
            inputs=[
                io.ClipVision.Input("clip_vision", tooltip="CLIP ViT-L, ViT-H or ViT-bigG, from Load CLIP Vision."),
                weight(),
                *crops_and_previous(),
                io.Combo.Input(
                    "crop_loss", options=["mean", "min"], default="mean",
                    tooltip="mean: all crops count. min: the nearest one, as in the authors' code.",
                ),
                io.Clip.Input("clip", optional=True, tooltip="Reads the text; the text tower that belongs to clip_vision."),
                io.String.Input("text", default="", multiline=True, optional=True, tooltip="What the picture should be."),
                io.Image.Input("image", optional=True, tooltip="Instead of a text: what it should be like; a batch is one."),
                previous(),
            ],
            outputs=outputs(),
        )  # fmt: skip

    @classmethod
    def execute(
        cls, clip_vision, weight, crops=0, crop_power=0.3, crop_loss="mean", clip=None, text="", image=None, previous=None
    ) -> io.NodeOutput:
        measure = clip_measure(clip_vision, clip, text, image, crops=crops, crop_power=crop_power, over=crop_loss)
        name = "CLIP, picture" if image is not None else f"CLIP, {text.strip()[:40]}"
        return io.NodeOutput(Loss(name=name, measure=measure, weight=weight, previous=previous))


class AestheticLossNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "RG_AestheticLoss",
            "Aesthetic Loss",
            aliases=[*ALIASES, "aesthetic score", "laion"],
            description="How the finished picture would be rated, about 1 to 10, by a small head on CLIP's features: the "
            "public linear and MLP heads.",
            inputs=[
                io.ClipVision.Input("clip_vision", tooltip="The one that the head was trained on: mostly CLIP ViT-L/14."),
                io.Combo.Input(
                    "head", options=loss_files("aesthetic_heads"),
                    tooltip="A .safetensors or .pth in models/aesthetic_heads, of tensors only.",
                ),
                weight(),
                io.Float.Input(
                    "target", default=0.0, min=0.0, max=10.0, step=0.1, tooltip="The score to come to; 0: as high as may be."
                ),
                *crops_and_previous(),
                previous(),
            ],
            outputs=outputs(),
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, head: str) -> bool | str:
        return known("aesthetic_heads", head)

    @classmethod
    def fingerprint_inputs(cls, head: str, **_others: Any) -> str:
        """A file that was replaced is loaded again."""
        return loss_file_version("aesthetic_heads", head)

    @classmethod
    def execute(cls, clip_vision, head, weight, target=0.0, crops=0, crop_power=0.3, previous=None) -> io.NodeOutput:
        measure = aesthetic_measure(clip_vision, head, target, crops=crops, crop_power=crop_power)
        return io.NodeOutput(Loss(name=f"aesthetic, {head}", measure=measure, weight=weight, previous=previous))


class ClassifierLossNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "RG_ClassifierLoss",
            "Classifier Loss",
            aliases=[*ALIASES, "fgvc", "imagenet", "class guidance"],
            description="That a classifier takes the finished picture for a class. The classifier is one of torchvision's "
            "networks, told by its tensors; files that hold programs are refused.",
            inputs=[
                io.Combo.Input(
                    "classifier", options=loss_files("classifiers"),
                    tooltip="A .safetensors or .pth of tensors in models/classifiers.",
                ),
                io.String.Input("label", default="0", tooltip="The class, by number or by name."),
                weight(),
                *crops_and_previous(),
                previous(),
            ],
            outputs=outputs(),
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, classifier: str) -> bool | str:
        return known("classifiers", classifier)

    @classmethod
    def fingerprint_inputs(cls, classifier: str, **_others: Any) -> str:
        """A file that was replaced is loaded again."""
        return loss_file_version("classifiers", classifier)

    @classmethod
    def execute(cls, classifier, label, weight, crops=0, crop_power=0.3, previous=None) -> io.NodeOutput:
        measure = classifier_measure(classifier, label, crops=crops, crop_power=crop_power)
        return io.NodeOutput(Loss(name=f"class {label}", measure=measure, weight=weight, previous=previous))


class PictureLossNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "RG_PictureLoss",
            "Picture Loss",
            aliases=[*ALIASES, "colour palette", "symmetry", "likeness", "edges"],
            description="Simple losses of the finished pixels, which need no further model. symmetry: left and right alike. "
            "likeness: the pixels of image. palette: its colours, wherever they are. edges: its edges.",
            inputs=[
                io.Combo.Input("kind", options=list(KINDS), default="palette", tooltip="What is compared."),
                weight(),
                io.Image.Input("image", optional=True, tooltip="The picture that is compared with; symmetry needs none."),
                io.Mask.Input("mask", optional=True, tooltip="Where it counts (white)."),
                previous(),
            ],
            outputs=outputs(),
        )

    @classmethod
    def execute(cls, kind, weight=1.0, image=None, mask=None, previous=None) -> io.NodeOutput:
        measure = picture_measure(kind, image, mask)
        return io.NodeOutput(Loss(name=kind, measure=measure, weight=weight, previous=previous))


def known(folder: Any, name: str | None) -> bool | str:
    """Older ComfyUIs don't hold a name against the list."""
    try:
        if name is not None:
            find_loss_file(folder, name)
    except OptimizationError as error:
        return str(error)
    return True


NODES = (ClipLossNode, AestheticLossNode, ClassifierLossNode, PictureLossNode)
