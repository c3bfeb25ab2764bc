"""A mask that says which part of a picture a crop of it shows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from rg_engine.errors import TargetError
from rg_engine.guidance.crop_marks import MARK, coordinate_mask, crop_of, mark, read_crop
from rg_engine.types import Region

MASK = coordinate_mask()
#: Left, top, width and height of crops, as fractions.
PLACES = [
    (0.0, 0.0, 0.5, 0.5), (0.5, 0.0, 0.5, 0.5), (0.5, 0.5, 0.5, 0.5), (0.3, 0.1, 0.25, 0.25), (0.75, 0.75, 0.25, 0.25),
    (0.0, 0.75, 0.25, 0.25), (0.4, 0.55, 0.3, 0.15), (0.1, 0.62, 0.14, 0.3), (0.13, 0.0, 0.8, 1.0),
]  # fmt: skip


def region(x: float, y: float, width: float, height: float) -> Region:
    return Region(x=x, y=y, width=width, height=height)


def box(place: tuple[float, ...], size: tuple[int, int]) -> tuple[int, ...]:
    """Left, top, right, bottom in px of a picture of so many px across and down, and back as fractions of it."""
    (x, y, w, h), (across, down) = place, size
    return round(x * across), round(y * down), round((x + w) * across), round((y + h) * down)


def distance(found: Region | None, px: tuple[int, ...], size: tuple[int, int]) -> float:
    """The largest distance of an edge from where it is, as a fraction of the picture."""
    assert found is not None, "the crop can't be read"
    wanted = (px[0] / size[0], px[1] / size[1], px[2] / size[0], px[3] / size[1])
    edges = (found.x, found.y, found.x + found.width, found.y + found.height)
    return max(abs(a - b) for a, b in zip(edges, wanted, strict=True))


def eight_bits(mask: torch.Tensor) -> torch.Tensor:
    return (mask.clamp(0, 1) * 255).round() / 255


def cut_as_pictures(px: tuple[int, ...], canvas: tuple[int, int], tile: tuple[int, int], *, padded: bool) -> torch.Tensor:
    """As tiled upscalers cut it: 8 bits, to the picture's size, cropped, to the tile's size; padded to its aspect or not."""
    image = Image.fromarray((MASK[0].numpy() * 255).astype(np.uint8))
    image = image.resize(canvas, Image.Resampling.BICUBIC).crop(px)
    if padded:
        ratio = min(tile[0] / image.width, tile[1] / image.height)
        inner = image.resize((round(image.width * ratio), round(image.height * ratio)), Image.Resampling.LANCZOS)
        left, top = (tile[0] - inner.width) // 2, (tile[1] - inner.height) // 2
        values = np.asarray(inner)
        values = np.pad(values, ((top, top), (left, left)), mode="edge")
        image = Image.fromarray(values)
    image = image.resize(tile, Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)[None]


def test_the_mask_is_nowhere_black():
    assert MASK.shape == (1, 1024, 1024)
    assert MASK.min() > 0.12
    assert MASK.max() <= 1


@pytest.mark.parametrize("place", PLACES)
def test_a_crop_of_the_mask_tells_its_place(place):
    px = box(place, (1024, 1024))
    crop = MASK[:, px[1] : px[3], px[0] : px[2]]
    assert distance(read_crop(crop), px, (1024, 1024)) < 1e-4
    assert distance(read_crop(eight_bits(crop)), px, (1024, 1024)) < 1e-3


@pytest.mark.parametrize("tile", [(128, 128), (512, 512), (768, 512)])
@pytest.mark.parametrize("place", PLACES)
def test_the_way_of_tiled_upscalers_leaves_the_place_readable(place, tile):
    size = (2048, 1536)
    px = box(place, size)
    assert distance(read_crop(cut_as_pictures(px, size, tile, padded=False)), px, size) < 3e-3


@pytest.mark.parametrize(
    ("size", "px", "tile"),
    [
        ((2048, 600), (512, 0, 1112, 600), (512, 768)),
        ((1024, 1024), (0, 0, 1024, 512), (512, 512)),
        ((1024, 1024), (300, 100, 500, 800), (512, 512)),
        ((2048, 2048), (100, 200, 673, 776), (576, 576)),
    ],
)
def test_what_fills_a_tile_beyond_the_crop_does_not_count(size, px, tile):
    assert distance(read_crop(cut_as_pictures(px, size, tile, padded=True)), px, size) < 5e-3


@pytest.mark.parametrize("size_px", [8, 16, 64, 128])
@pytest.mark.parametrize("mode", ["bilinear", "bicubic", "area", "nearest-exact"])
def test_a_crop_resized_to_few_px_can_be_read(size_px, mode):
    for place in PLACES:
        px = box(place, (1024, 1024))
        crop = F.interpolate(MASK[None, :, px[1] : px[3], px[0] : px[2]], (size_px, size_px), mode=mode)[0]
        assert distance(read_crop(eight_bits(crop)), px, (1024, 1024)) < (0.012 if size_px == 8 else 0.004)


def test_the_whole_mask_is_the_whole_picture():
    for size_px in (8, 64, 1024):
        found = read_crop(eight_bits(F.interpolate(MASK[None], (size_px, size_px), mode="bilinear", antialias=True)[0]))
        assert found is not None
        assert found.is_whole


def test_black_around_a_crop_does_not_count():
    px = (512, 0, 1024, 400)
    canvas = torch.zeros(1, 450, 600)
    canvas[:, 50:, :512] = MASK[:, px[1] : px[3], px[0] : px[2]]
    assert distance(read_crop(canvas), px, (1024, 1024)) < 1e-3


def test_the_first_of_a_batch_of_masks_is_read():
    assert read_crop(torch.cat([MASK[:, 512:, 512:], MASK[:, :512, :512]])) == read_crop(MASK[0, 512:, 512:])


@pytest.mark.parametrize("quantised", [False, True])
def test_other_masks_are_no_crops(quantised):
    t = torch.linspace(0, 1, 64)
    down, across = torch.meshgrid(t, t, indexing="ij")
    generator = torch.Generator().manual_seed(0)
    others = [
        *(torch.full((64, 64), float(value)) for value in torch.linspace(0, 1, 21)),
        across, 0.3 + 0.5 * across, 1 - 0.8 * (across - 0.5).square() - 0.8 * (down - 0.5).square(),
        0.2 + 0.7 * torch.exp(-(across - 0.4).square() / 0.3 - (down - 0.6).square() / 0.3), (across > 0.5).float(),
        0.15 + 0.8 * torch.rand(64, 64, generator=generator), 0.5 + 0.2 * torch.cos(6 * across) + 0.2 * torch.cos(3 * down),
        MASK[0].flip(0), MASK[0].flip(1), MASK[0] * 0.8, 1 - MASK[0], torch.full((64, 64), float("nan")),
    ]  # fmt: skip
    for other in others:
        assert read_crop(eight_bits(other) if quantised else other) is None
    assert read_crop(MASK[:, :7, :7]) is None


def test_prompts_are_marked_and_their_other_options_stay():
    embeddings = [torch.rand(1, 2), torch.rand(1, 2)]
    out = mark([[embeddings[0], {"pooled_output": 1}], [embeddings[1], {"strength": 0.5}]], (512, 512))
    assert [given[0] for given in out] == embeddings
    assert out[0][1]["pooled_output"] == 1
    assert out[1][1]["strength"] == 0.5
    for _, options in out:
        assert options[MARK] is True
        assert options["mask_strength"] == 1.0
        assert options["set_area_to_bounds"] is False
        assert torch.equal(options["mask"], MASK)
    assert crop_of([options for _, options in mark(out, (64, 64))]) == Region.whole()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mask": torch.ones(1, 8, 8)}, "a mask of its own.*Set Mask"),
        ({"area": (8, 8, 0, 0)}, "an area of its own.*Set Area"),
    ],
)
def test_a_prompt_with_a_mask_or_an_area_is_refused(options, words):
    with pytest.raises(TargetError, match=f"prompt 2 of 2 has {words}"):
        mark([[torch.rand(1, 2), {}], [torch.rand(1, 2), options]], (64, 64))


@pytest.mark.parametrize(
    ("picture", "size"),
    [((512, 768), (1024, 1536)), ((1024, 1024), (1024, 1024)), ((100, 40), (1100, 440)), ((6000, 4000), (2048, 1365))],
)
def test_the_mask_has_the_pictures_aspect(picture, size):
    ((_, options),) = mark([[torch.rand(1, 2), {}]], picture)
    assert options["mask"].shape == (1, *size)


@pytest.mark.parametrize("size", [(768, 512), (1000, 1500), (3000, 2000)])
@pytest.mark.parametrize("place", PLACES)
def test_the_way_of_detailers_leaves_the_place_readable(place, size):
    """They scale a crop's px by the ratio of the heights across, and of the widths down."""
    px = box(place, size)
    ((_, options),) = mark([[torch.rand(1, 2), {}]], (size[1], size[0]))
    mask = options["mask"]
    scales = (mask.shape[1] / size[1], mask.shape[2] / size[0])
    left, top, right, bottom = (round(value * scales[i % 2]) for i, value in enumerate(px))
    assert distance(read_crop(mask[:, top:bottom, left:right]), px, size) < 2e-3


def test_the_crop_of_prompts_is_that_of_the_first_marked_one():
    assert crop_of([]) is None
    assert crop_of([{"mask": MASK}, {}]) is None
    crop = MASK[:, 256:512, 512:1024]
    found = crop_of([{"mask": crop, MARK: True}, {"mask": MASK, MARK: True}])
    assert distance(found, (512, 256, 1024, 512), (1024, 1024)) < 1e-4


def test_prompts_of_which_some_are_not_marked_are_refused():
    """Without a mask they would outweigh the marked ones."""
    with pytest.raises(TargetError, match="some of the prompts went through Follow Crops and others did not"):
        crop_of([{}, {"mask": MASK, MARK: True}])


@pytest.mark.parametrize("given", [{}, {"mask": None}, {"mask": torch.ones(1, 64, 64)}, {"mask": torch.ones(1, 0, 8)}])
def test_a_marked_prompt_whose_mask_was_replaced_is_refused(given):
    with pytest.raises(TargetError, match=r"went through Follow Crops, but .*Put Follow Crops last"):
        crop_of([{**given, MARK: True}])


@pytest.mark.parametrize(
    "values", [(-0.1, 0, 1, 1), (0, 0, 0, 1), (0.5, 0, 0.6, 1), (0, 1, 1, 0.5), (0, 0, 1, float("nan"))]
)
def test_a_region_outside_the_picture_is_refused(values):
    with pytest.raises(TargetError, match="outside the picture"):
        region(*values)


def test_the_whole_region():
    assert region(0, 0, 1, 1) == Region.whole()
    assert not region(0, 0, 1, 0.5).is_whole
