"""Training data in folders.

    pictures/a.png  controls/a.png        spatial and lgp: the control of the same name (lgp: an edge map)
    pictures/a.png  controls/a.npz        keypoint: keypoints (J, 2) or (J, 3) of x, y, seen, in pixels
    clips/one/*.png clips/one/tracks.npz  correspondence: frames by name; tracks (F, P, 2) in pixels, visible (F, P) optional
    identities/one/*.png                  appearance: a folder an identity, two pictures or more each

A picture's prompt, where prompts are asked for, is the text file beside it.
"""

from __future__ import annotations

import dataclasses
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ...errors import TrainingError
from ..config import TrainingConfig

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
POINTS_AN_EXAMPLE = 64
HEATMAP_SPREAD = 0.025  # sigma of a joint's heat map, as a part of the picture


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class FileExamples:
    """pictures, M files; groups (N, K), which belong together; controls, N files, or truth (N, ...), or neither."""

    pictures: list[Path]
    groups: Tensor
    controls: list[Path] | None = None
    truth: Tensor | None = None


def gather_files(config: TrainingConfig) -> FileExamples:
    """The examples that a config's folders hold. Raises TrainingError for empty folders, missing partners and bad
    numbers."""
    match config.kind:
        case "spatial" | "lgp":
            pictures, controls = _pairs(config, PICTURES)
            for picture, control in zip(pictures, controls, strict=True):
                check_alike(picture, control)
            return FileExamples(pictures=pictures, groups=_one_by_one(pictures), controls=controls)
        case "keypoint":
            pictures, controls = _pairs(config, (".npz",))
            maps = [_heatmaps(control, picture, config.size) for picture, control in zip(pictures, controls, strict=True)]
            counts = {len(each) for each in maps}
            if len(counts) > 1:
                raise TrainingError(f"keypoints come in different numbers ({sorted(counts)}): every picture needs as many")
            return FileExamples(pictures=pictures, groups=_one_by_one(pictures), truth=torch.stack(maps))
        case "correspondence":
            return _clips(config)
        case "appearance":
            return _identities(config)


def load_picture(path: Path, size_px: int) -> Tensor:
    """A picture cropped to a square about its centre, (size, size, 3) in 0..1."""
    with _opened(path) as image:
        left, top, side = crop_of(*image.size)
        try:
            square = image.convert("RGB").crop((left, top, left + side, top + side))
        except Exception as error:  # decoders raise whatever a damaged file leads them to
            raise TrainingError(f"{path.name!r} is no picture that can be read: it is truncated or damaged") from error
        pixels = np.asarray(square.resize((size_px, size_px), Image.Resampling.LANCZOS), dtype=np.float32)
    return torch.from_numpy(pixels / 255)


def crop_of(width: int, height: int) -> tuple[int, int, int]:
    """Left, top and side of the largest square about the centre."""
    side = min(width, height)
    return (width - side) // 2, (height - side) // 2, side


def check_alike(picture: Path, control: Path) -> None:
    """Raises TrainingError unless both have the same aspect ratio."""
    with _opened(picture) as a, _opened(control) as b:
        if abs(a.width * b.height - b.width * a.height) > 0.01 * a.width * b.height:
            raise TrainingError(
                f"{picture.name!r} is {a.width}x{a.height} and its control {control.name!r} {b.width}x{b.height}: "
                "they must show the same part of the scene"
            )


def prompt_of(picture: Path) -> str:
    """The text beside a picture. Raises TrainingError if there is none."""
    path = picture.with_suffix(".txt")
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingError(f"{picture.name!r} has no caption: expected {path.name!r} beside it, or set prompt") from error


def _pairs(config: TrainingConfig, endings: tuple[str, ...]) -> tuple[list[Path], list[Path]]:
    assert config.pictures is not None
    assert config.controls is not None
    pictures = _listed(config.pictures, PICTURES, "pictures")
    controls = {path.stem: path for path in _listed(config.controls, endings, "controls")}
    alone = [path.name for path in pictures if path.stem not in controls]
    if alone:
        raise TrainingError(
            f"{len(alone)} of {len(pictures)} pictures have no control of the same name ({', '.join(alone[:3])}): "
            f"expected {Path(alone[0]).stem}{endings[0]} in {config.controls.name!r}"
        )
    return pictures, [controls[path.stem] for path in pictures]


def _clips(config: TrainingConfig) -> FileExamples:
    assert config.clips is not None
    rng = np.random.default_rng(config.settings.seed)
    pictures: list[Path] = []
    clips: list[tuple[int, np.ndarray]] = []  # first picture, points (F, P, 2) as fractions of the crop, NaN where not seen
    for folder in _folders(config.clips, "clips"):
        frames = _listed(folder, PICTURES, f"clip {folder.name!r}")
        points = _tracks(folder / "tracks.npz", frames)
        clips.append((len(pictures), points))
        pictures += frames
    groups, truth = [], np.full((config.examples, POINTS_AN_EXAMPLE, 2, 2), np.nan, np.float32)
    for i in range(config.examples):
        for _ in range(100):
            first, points = clips[int(rng.integers(len(clips)))]
            a, b = rng.choice(len(points), 2, replace=False)
            both = np.stack([points[a], points[b]], 1)  # (P, 2, 2)
            both = both[~np.isnan(both).any((1, 2))]
            if len(both):
                break
        else:
            raise TrainingError("hardly any two frames share a point that is seen in both: look at tracks and visible")
        chosen = rng.permutation(len(both))[:POINTS_AN_EXAMPLE]
        truth[i, : len(chosen)] = both[chosen]
        groups.append([first + int(a), first + int(b)])
    return FileExamples(pictures=pictures, groups=torch.tensor(groups), truth=torch.from_numpy(truth))


def _tracks(path: Path, frames: list[Path]) -> np.ndarray:
    """Tracks (F, P, 2) as fractions of the frames' centre squares, NaN where they are not seen or cropped away."""
    found = _arrays(path, ("tracks",))
    tracks = found["tracks"].astype(np.float64)
    if tracks.ndim != 3 or tracks.shape[2] != 2 or len(tracks) != len(frames) or len(frames) < 2:
        raise TrainingError(
            f"{path.parent.name}/{path.name} has tracks of shape {tracks.shape} for {len(frames)} frames: expected "
            "(frames, points, 2)"
        )
    visible = np.asarray(found.get("visible", np.ones(tracks.shape[:2])), bool)
    if visible.shape != tracks.shape[:2]:
        raise TrainingError(
            f"{path.parent.name}/{path.name} has visible of shape {visible.shape}: expected {tracks.shape[:2]}"
        )
    with _opened(frames[0]) as image:
        width, height = image.size
    seen = tracks[visible]
    if not np.isfinite(seen).all() or (seen < 0).any() or (seen > (width, height)).any():
        raise TrainingError(
            f"{path.parent.name}/{path.name} has points outside its frames of {width}x{height} pixels that are "
            "marked visible"
        )
    left, top, side = crop_of(width, height)
    points = (tracks - (left, top)) / side
    points[~visible | ((points < 0) | (points > 1)).any(2)] = np.nan
    return points


def _identities(config: TrainingConfig) -> FileExamples:
    assert config.identities is not None
    rng = np.random.default_rng(config.settings.seed)
    pictures: list[Path] = []
    people: list[list[int]] = []
    for folder in _folders(config.identities, "identities"):
        found = _listed(folder, PICTURES, f"identity {folder.name!r}")
        if len(found) < 2:
            raise TrainingError(
                f"identity {folder.name!r} has one picture: two or more are needed to learn what stays the same"
            )
        people.append(list(range(len(pictures), len(pictures) + len(found))))
        pictures += found
    if len(people) < 2:
        raise TrainingError("there is one identity only: two or more are needed to tell them apart")
    groups = []
    for _ in range(config.examples):
        one, other = rng.choice(len(people), 2, replace=False)
        groups.append([*map(int, rng.choice(people[one], 2, replace=False)), int(rng.choice(people[other]))])
    return FileExamples(pictures=pictures, groups=torch.tensor(groups))


def _heatmaps(path: Path, picture: Path, size_px: int) -> Tensor:
    """A joint's Gaussian each, (J, size / 8, size / 8) in 0..1; empty where it is not seen or cropped away."""
    keypoints = _arrays(path, ("keypoints",))["keypoints"].astype(np.float64)
    if keypoints.ndim != 2 or keypoints.shape[1] not in (2, 3) or not len(keypoints):
        raise TrainingError(
            f"{path.name!r} has keypoints of shape {keypoints.shape}: expected (J, 2), or (J, 3) with seen or not"
        )
    with _opened(picture) as image:
        left, top, side = crop_of(*image.size)
        width, height = image.size
    seen = keypoints[:, 2] > 0 if keypoints.shape[1] == 3 else np.ones(len(keypoints), bool)
    places = keypoints[:, :2]
    if not np.isfinite(places[seen]).all() or (places[seen] < 0).any() or (places[seen] > (width, height)).any():
        raise TrainingError(f"{path.name!r} has keypoints outside of {picture.name!r}, which is {width}x{height} pixels")
    cells = size_px // 8
    grid = (np.arange(cells) + 0.5) / cells
    points = np.where(seen[:, None], (places - (left, top)) / side, 0.0)
    spread = max(HEATMAP_SPREAD, 1 / cells)  # a narrower one would fall between the cells
    across = np.exp(-((grid - points[:, :1]) ** 2) / (2 * spread**2))  # (J, cells)
    down = np.exp(-((grid - points[:, 1:]) ** 2) / (2 * spread**2))
    maps = down[:, :, None] * across[:, None, :] * seen[:, None, None]
    return torch.from_numpy(maps.astype(np.float32))


def _arrays(path: Path, needed: tuple[str, ...]) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {key: file[key] for key in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise TrainingError(
            f"{path.parent.name}/{path.name} can't be read: expected an .npz with {', '.join(needed)}"
        ) from error
    missing = [key for key in needed if key not in found]
    if missing:
        raise TrainingError(
            f"{path.parent.name}/{path.name} has no {', '.join(missing)}, but {', '.join(found) or 'nothing'}"
        )
    return found


def _listed(folder: Path, endings: tuple[str, ...], what: str) -> list[Path]:
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in endings and path.is_file())
    if not found:
        raise TrainingError(f"{what}: there is no {' or '.join(endings[:3])} in {str(folder)!r}")
    return found


def _folders(folder: Path, what: str) -> list[Path]:
    found = sorted(path for path in folder.iterdir() if path.is_dir())
    if not found:
        raise TrainingError(f"{what}: there is no folder in {str(folder)!r}; expected one for each")
    return found


def _opened(path: Path) -> Image.Image:
    try:
        return Image.open(path)
    except (OSError, UnidentifiedImageError) as error:
        raise TrainingError(f"{path.name!r} is no picture that can be read") from error


def _one_by_one(pictures: list[Path]) -> Tensor:
    return torch.arange(len(pictures))[:, None]
