"""A class of a classifier: torchvision's own networks, told by their tensors, so that no program comes with a file."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import OptimizationError
from ..pixels import IMAGENET_MEAN, IMAGENET_STD, WHOLE, Crops, as_pixels, normalised

#: torchvision's names, and the size of picture that each was trained on where it is not 224 px.
ARCHITECTURES = (
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2", "wide_resnet101_2",
    "resnext50_32x4d", "resnext101_32x8d", "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large", "convnext_tiny",
    "convnext_small", "convnext_base", "convnext_large", "efficientnet_b0", "efficientnet_b1", "efficientnet_b2",
    "efficientnet_b3", "efficientnet_b4", "efficientnet_v2_s", "efficientnet_v2_m", "densenet121", "densenet169",
    "densenet201", "shufflenet_v2_x1_0", "squeezenet1_1", "vgg11", "vgg16", "vgg16_bn",
    "vgg19", "alexnet", "vit_b_16", "vit_b_32", "vit_l_16", "swin_t", "swin_s", "swin_b", "swin_v2_t", "inception_v3",
)  # fmt: skip
SIZES_PX = {
    "inception_v3": 299, "efficientnet_b1": 240, "efficientnet_b2": 288, "efficientnet_b3": 300, "efficientnet_b4": 380,
    "efficientnet_v2_s": 384, "efficientnet_v2_m": 480, "swin_v2_t": 256,
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classifier:
    """network: normalised pictures (n, 3, size, size) to (n, classes). names: of the classes, empty if they are unknown."""

    name: str
    network: nn.Module
    classes: int
    names: tuple[str, ...] = ()
    size_px: int = 224

    def number(self, label: str) -> int:
        """A class by number or by name. Raises OptimizationError if there is none such."""
        text = label.strip()
        if re.fullmatch(r"\d+", text):
            if int(text) < self.classes:
                return int(text)
            raise OptimizationError(f"there is no class {text}: {self.name!r} has the classes 0 to {self.classes - 1}")
        lowered = [name.lower() for name in self.names]
        if text.lower() in lowered:
            return lowered.index(text.lower())
        near = [name for name in self.names if text and text.lower() in name.lower()][:6]
        known = "does not name its classes" if not self.names else f"has {', '.join(near or self.names[:6])} ..."
        raise OptimizationError(
            f"there is no class {label!r}: {self.name!r} {known}; give one of its names, or a number of 0 to "
            f"{self.classes - 1}"
        )


@torch.inference_mode(False)
def load_classifier(tensors: dict[str, Tensor], metadata: dict[str, str], name: str) -> Classifier:
    """The network that a file's tensors belong to, frozen. Raises OptimizationError for one that is not torchvision's.

    metadata may hold ``classes``, a JSON list of names; networks of 1000 classes have ImageNet's.
    """
    import torchvision

    classes = _classes(tensors, name)
    shapes = {key: tuple(value.shape) for key, value in tensors.items()}
    for architecture in ARCHITECTURES:
        build: Callable[..., nn.Module] = getattr(torchvision.models, architecture)
        extra = {"init_weights": False} if architecture == "inception_v3" else {}
        with torch.device("meta"):
            network = build(weights=None, num_classes=classes, **extra)
        if {key: tuple(value.shape) for key, value in network.state_dict().items()} != shapes:
            continue
        floats = {key: value.float() if value.is_floating_point() else value for key, value in tensors.items()}
        network = build(weights=None, num_classes=classes, **extra)  # buffers outside of the state need their values
        network.load_state_dict(floats)
        names = tuple(map(str, json.loads(metadata["classes"]))) if "classes" in metadata else _imagenet_names(classes)
        return Classifier(
            name=name, network=network.eval().requires_grad_(False), classes=classes, names=names,
            size_px=SIZES_PX.get(architecture, 224),
        )  # fmt: skip
    raise OptimizationError(
        f"{name!r} is no network of torchvision's that is known here ({', '.join(ARCHITECTURES[:5])}, ...): it begins with "
        f"{', '.join(list(tensors)[:3])}"
    )


def _classes(tensors: dict[str, Tensor], name: str) -> int:
    last = [key for key in tensors if re.fullmatch(r"(fc|classifier|classifier\.\d+|head|heads\.head)\.weight", key)]
    if not last:
        raise OptimizationError(f"{name!r} is no classifier: it has no last layer (fc, classifier or head)")
    return tensors[last[-1]].shape[0]


def _imagenet_names(classes: int) -> tuple[str, ...]:
    from torchvision.models import ResNet18_Weights

    return tuple(ResNet18_Weights.DEFAULT.meta["categories"]) if classes == 1000 else ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierLoss:
    """network: normalised pictures to logits; label: which class they should be of."""

    network: Callable[[Tensor], Tensor]
    label: int
    crops: Crops = WHOLE

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Cross entropy, the mean over crops, (B,)."""
        found = []
        for view in self.crops.views(as_pixels(images), generator):
            logits = self.network(normalised(view, IMAGENET_MEAN, IMAGENET_STD))
            label = torch.full((len(logits),), self.label, device=logits.device)
            found.append(F.cross_entropy(logits, label, reduction="none"))
        return torch.stack(found).mean(0)
