"""The file of ``python -m rg_engine train-oft --config FILE``: YAML or JSON, one level deep."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ...errors import TrainingError
from ...training.config import read_table
from .settings import OftSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class OftConfig:
    """What to train an adapter on, and where to put it.

    out: its ``.safetensors``. model: a checkpoint's path, or ``demo``. pictures: a folder of the subject; prompt: of every
    picture, or ``captions`` for the text file beside each. class_pictures, class_prompt: of its class, for prior
    preservation.
    size: of the pictures in pixels, cropped about their centre. light: transformer blocks run again in backward, in less
    memory. device: auto or cpu. Everything else is :class:`OftSettings`.
    """

    out: Path
    pictures: Path
    prompt: str
    model: str = "demo"
    class_pictures: Path | None = None
    class_prompt: str = ""
    size: int = 512
    light: bool = False
    device: str = "auto"
    settings: OftSettings = dataclasses.field(default_factory=OftSettings)

    def __post_init__(self) -> None:
        if self.out.suffix != ".safetensors":
            raise TrainingError(f"out is {self.out.name!r}: an adapter's file ends in .safetensors")
        for name in ("pictures", "class_pictures"):
            folder = getattr(self, name)
            if folder is not None and not folder.is_dir():
                raise TrainingError(f"{name}: there is no folder {str(folder)!r}")
        if (self.class_pictures is None) != (not self.class_prompt):
            raise TrainingError("prior preservation takes class_pictures and class_prompt: give both, or neither")
        if self.size < 64 or self.size % 8:
            raise TrainingError(f"size is {self.size}: it must be a multiple of 8, 64 or more")
        if self.device not in ("auto", "cpu"):
            raise TrainingError(f"device is {self.device!r}: choose auto or cpu")


def read_oft_config(path: Path) -> OftConfig:
    """Raises TrainingError for what it does not know or can't read."""
    return read_table(path, OftConfig, OftSettings, required=("out", "pictures", "prompt"))
