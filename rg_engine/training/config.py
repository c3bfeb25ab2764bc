"""The file of ``python -m rg_engine train --config FILE``: YAML or JSON, one level deep."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import yaml

from ..errors import TrainingError
from ..types import HEAD_KINDS, HeadKind
from .settings import TrainingSettings

Config = TypeVar("Config")
#: Which folders each kind of head learns from.
SOURCES: dict[HeadKind, tuple[str, ...]] = {
    "spatial": ("pictures", "controls"),
    "keypoint": ("pictures", "controls"),
    "lgp": ("pictures", "controls"),
    "correspondence": ("clips",),
    "appearance": ("identities",),
}
#: A value's kind in words.
EXPECTED = {"float": "a number", "int": "a whole number", "bool": "true or false"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What to train, on what, and where to put it.

    kind, out: the head, and its ``.safetensors``. model: a checkpoint's path, ``demo`` or ``demo transformer``. Folders, see
    :mod:`.folders`: pictures and controls (spatial, keypoint, lgp), clips (correspondence), identities (appearance).
    examples: how many are drawn from clips or identities. prompt: of every picture, or ``captions`` for the text file beside
    each. size: of the pictures in pixels, cropped about their centre. width: the head's channels. block: of the model, that
    the head reads, by name or number, several with commas in between; empty for the usual one. sparse: controls are mostly
    empty. temperature (correspondence), margin (appearance). device: auto or cpu. Everything else is
    :class:`TrainingSettings`.
    """

    kind: HeadKind
    out: Path
    model: str = "demo"
    pictures: Path | None = None
    controls: Path | None = None
    clips: Path | None = None
    identities: Path | None = None
    examples: int = 1000
    prompt: str = ""
    size: int = 512
    width: int = 384
    block: str = ""
    sparse: bool = True
    temperature: float = 0.07
    margin: float = 0.5
    device: str = "auto"
    settings: TrainingSettings = dataclasses.field(default_factory=TrainingSettings)

    def __post_init__(self) -> None:
        if self.kind not in HEAD_KINDS:
            raise TrainingError(f"kind {self.kind!r} is unknown: expected one of {', '.join(HEAD_KINDS)}")
        if self.out.suffix != ".safetensors":
            raise TrainingError(f"out is {self.out.name!r}: a head's file ends in .safetensors")
        for source in SOURCES[self.kind]:
            folder = getattr(self, source)
            if folder is None:
                raise TrainingError(
                    f"a {self.kind} head is trained from {' and '.join(SOURCES[self.kind])}: name the folder {source}"
                )
            if not folder.is_dir():
                raise TrainingError(f"{source}: there is no folder {str(folder)!r}")
        for name, least, step in (("size", 64, 8), ("width", 64, 64), ("examples", 1, 1)):
            value = getattr(self, name)
            if value < least or value % step:
                raise TrainingError(f"{name} is {value}: it must be a multiple of {step}, {least} or more")
        if self.width not in (64, 128, 256, 384, 512, 768):
            raise TrainingError(f"width is {self.width}: choose one of 64, 128, 256, 384, 512, 768")
        if not self.temperature > 0 or not self.margin > 0:
            raise TrainingError("temperature and margin must be above 0")
        if self.device not in ("auto", "cpu"):
            raise TrainingError(f"device is {self.device!r}: choose auto or cpu")


def read_config(path: Path) -> TrainingConfig:
    """Read a head's config. Raises TrainingError for what it does not know or can't read."""
    return read_table(path, TrainingConfig, TrainingSettings, required=("kind", "out"))


def read_table(path: Path, config: Callable[..., Config], settings: Callable[..., Any], required: tuple[str, ...]) -> Config:
    """Read a file of settings, of ``config`` itself and of its field ``settings``, side by side; folders in it are relative
    to it. Raises TrainingError for what it does not know or can't read."""
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TrainingError(f"the config {str(path)!r} can't be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise TrainingError(f"the config {path.name!r} is neither YAML nor JSON: {error}") from error
    if not isinstance(given, dict):
        raise TrainingError(f"the config {path.name!r} holds no settings: expected lines such as '{required[0]}: ...'")
    own = {field.name: field for field in _fields(config) if field.name != "settings"}
    training = {field.name: field for field in _fields(settings)}
    unknown = [str(key) for key in given if key not in own and key not in training]
    if unknown:
        raise TrainingError(
            f"{path.name!r} has settings that don't exist: {', '.join(unknown)}. Known are: {', '.join([*own, *training])}"
        )
    missing = [key for key in required if key not in given]
    if missing:
        raise TrainingError(f"{path.name!r} does not say {' and '.join(missing)}")
    values = {key: _typed(key, value, str({**own, **training}[key].type), path.parent) for key, value in given.items()}
    if values.get("model", "demo") != "demo":
        values["model"] = str(path.parent / values["model"])
    return config(
        **{key: value for key, value in values.items() if key in own},
        settings=settings(**{key: value for key, value in values.items() if key in training}),
    )


def _fields(table: Any) -> tuple[dataclasses.Field, ...]:
    return dataclasses.fields(table)


def _typed(key: str, value: Any, kind: str, folder: Path) -> Any:
    """``value`` as the field wants it: YAML reads 1e-3 as a text, and whole numbers where fractions may stand."""
    try:
        if kind == "float" and not isinstance(value, bool):
            return float(value)
        if kind == "int" and not isinstance(value, bool) and int(value) == float(value):
            return int(value)
        if kind == "bool" and isinstance(value, bool):
            return value
        if "Path" in kind and isinstance(value, str):
            return folder / value
        if kind not in ("float", "int", "bool") and "Path" not in kind and isinstance(value, str):
            return value
    except (TypeError, ValueError, OverflowError):
        pass
    raise TrainingError(f"{key} is {value!r}: expected {EXPECTED.get(kind, 'a text')}")
