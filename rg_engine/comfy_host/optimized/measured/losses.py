"""PICTURE_LOSSes of what a graph holds: IMAGEs, masks, CLIP, CLIP_VISION, and files of the model folders."""

from __future__ import annotations

from typing import Any, Literal

import comfy.model_management
import comfy.model_patcher
import torch
from torch import Tensor

from ....errors import OptimizationError
from ....optimization import Crops, Measure
from ....optimization.files import read_tensors
from ....optimization.losses import (
    AestheticLoss,
    Classifier,
    ClassifierLoss,
    ClipLoss,
    LikenessLoss,
    PaletteLoss,
    aesthetic_head,
    load_classifier,
    mean_feature,
    symmetry_loss,
)
from ....optimization.losses.clip import Over
from ...folders import find_loss_file
from ...loaded.gradient_scope import GradientScope
from ..rerun import Stage
from .vision import PictureEncoder, text_feature

Kind = Literal["symmetry", "likeness", "palette", "edges"]
KINDS: tuple[Kind, ...] = ("symmetry", "likeness", "palette", "edges")


def picture_measure(kind: Kind, image: Tensor | None, mask: Tensor | None) -> Measure:
    """Raises OptimizationError where a kind needs an image that is not there."""
    if kind == "symmetry":
        return symmetry_loss
    if image is None:
        raise OptimizationError(f"{kind} compares with a picture: connect image")
    with torch.inference_mode(False):
        picture = image[..., :3].clone().movedim(-1, 1).float()
        where = None if mask is None else mask.clone().reshape(-1, 1, *mask.shape[-2:]).float()
    if where is not None and not bool(where.any()):
        raise OptimizationError("the mask is black, so that nothing would be compared: draw where the loss should count")
    if kind == "palette":
        return PaletteLoss(picture=picture, mask=where)
    return LikenessLoss(picture=picture, mask=where, by_edges=kind == "edges")


def clip_measure(
    clip_vision: Any, clip: Any, text: str, image: Tensor | None, *, crops: int, crop_power: float, over: Over
) -> Measure:
    """Raises OptimizationError for neither or both of text and image, and towers that share no space."""
    encoder = PictureEncoder(clip_vision)
    if (image is None) == (not text.strip()):
        given = "both text and image" if image is not None else "neither text nor image"
        raise OptimizationError(f"this loss has {given}: give one of them, and chain a second loss for another")
    if image is None and clip is None:
        raise OptimizationError("the text needs a CLIP to be read by: connect clip, or an image instead of the text")
    with torch.inference_mode(False), torch.no_grad():
        wanted = text_feature(clip, text, encoder.width) if image is None else mean_feature(encoder.of_pictures(image))
    return ClipLoss(embed=encoder, wanted=wanted, crops=_crops(crops, crop_power, encoder.size_px), over=over)


def aesthetic_measure(clip_vision: Any, head_name: str, target: float, *, crops: int, crop_power: float) -> Measure:
    """Raises OptimizationError for a head of another width than the encoder's features."""
    encoder = PictureEncoder(clip_vision)
    tensors, _ = read_tensors(find_loss_file("aesthetic_heads", head_name))
    head = aesthetic_head(tensors, head_name)
    if head.width != encoder.width:
        raise OptimizationError(
            f"the head {head_name!r} rates {head.width} features and this CLIP Vision model gives {encoder.width}: most "
            "heads go with CLIP ViT-L/14 (768), some with ViT-H or ViT-bigG"
        )
    return AestheticLoss(embed=encoder, head=head, target=target, crops=_crops(crops, crop_power, encoder.size_px))


def classifier_measure(name: str, label: str, *, crops: int, crop_power: float) -> Measure:
    """Raises OptimizationError for a file or a class that there is not."""
    tensors, metadata = read_tensors(find_loss_file("classifiers", name))
    classifier = load_classifier(tensors, metadata, name)
    number = classifier.number(label)
    return ClassifierLoss(
        network=LoadedClassifier(classifier), label=number, crops=_crops(crops, crop_power, classifier.size_px)
    )


class LoadedClassifier:
    """A classifier that ComfyUI loads and unloads; a function of normalised pictures."""

    def __init__(self, classifier: Classifier) -> None:
        device = comfy.model_management.get_torch_device()
        self._network = classifier.network
        self._patcher = comfy.model_patcher.ModelPatcher(
            classifier.network, load_device=device, offload_device=comfy.model_management.unet_offload_device()
        )
        self._scope = GradientScope(classifier.network)

    def __call__(self, pixels: Tensor) -> Tensor:
        return Stage(self._classify, self._scoped, ready=self._load)(pixels)

    def _classify(self, pixels: Tensor) -> Tensor:
        logits = self._network(pixels.to(self._patcher.load_device))
        return logits.float().to(pixels.device)

    def _load(self) -> None:
        comfy.model_management.load_model_gpu(self._patcher)

    def _scoped(self) -> GradientScope:
        return self._scope


def _crops(count: int, power: float, size_px: int) -> Crops:
    return Crops(count=count, power=power, size_px=size_px, smallest_px=size_px)
