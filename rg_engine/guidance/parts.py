"""Which part of the pictures a model call was given: all of them, some of a batch, a tile, a crop.

Other nodes call the model on tiles and on windows of a batch, each in its own way. What they cut out are the latent's own
values, so where a part lies can be seen from the values themselves, whoever cut it.

Shapes: latent (B, C, H, W), what is being made; call (R, C, h, w), what the model was given.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """Rows of a call that show the same window of some of the pictures.

    rows: of the call; pictures: which pictures of the batch they show, in the same order; chunk: which of the prompts of
    the call they were run with; down (h,), across (w,): the window's cells, None where it is as large as the picture.
    """

    rows: slice | Tensor = dataclasses.field(default_factory=lambda: slice(None))
    pictures: slice | Tensor = dataclasses.field(default_factory=lambda: slice(None))
    chunk: int = 0
    down: Tensor | None = None
    across: Tensor | None = None

    @property
    def whole(self) -> bool:
        """Whether it shows all of every picture."""
        return self.down is None and isinstance(self.pictures, slice)

    def of(self, maps: Tensor) -> Tensor:
        """This part of maps (B, D, H, W), (b, D, h, w)."""
        return self.of_cells(self.of_pictures(maps))

    def of_pictures(self, values: Tensor) -> Tensor:
        """The rows of its pictures, of (B, ...)."""
        return values if isinstance(self.pictures, slice) else values[self.pictures.to(values.device)]

    def of_cells(self, maps: Tensor) -> Tensor:
        """The cells of its window, of (b, D, H, W)."""
        if self.down is None or self.across is None:
            return maps
        return maps[..., self.down.to(maps.device)[:, None], self.across.to(maps.device)]

    def add_to(self, maps: Tensor, values: Tensor) -> None:
        """Add values (b, D, h, w) to this part of maps (B, D, H, W)."""
        if self.whole:
            maps += values
            return
        device, (batch, _, height, width) = maps.device, maps.shape
        pictures = torch.arange(batch) if isinstance(self.pictures, slice) else self.pictures
        down = torch.arange(height) if self.down is None else self.down
        across = torch.arange(width) if self.across is None else self.across
        where = (pictures.to(device)[:, None, None], slice(None), down.to(device)[:, None], across.to(device))
        maps[where] += values.permute(0, 2, 3, 1)  # indices on both sides of a slice put its axis last

    @property
    def key(self) -> tuple[object, ...]:
        """What tells parts apart, whatever rows they came in."""
        pictures = None if isinstance(self.pictures, slice) else tuple(self.pictures.tolist())
        if self.down is None or self.across is None:
            return (pictures,)
        return pictures, int(self.down[0]), int(self.across[0]), len(self.down), len(self.across)


def parts_of(call: Tensor, latent: Tensor, chunks: int = 1) -> list[Part] | None:
    """The parts that a call's rows show; None if some row shows none.

    chunks: how many prompts ran in it, on the same rows, each after the other. A tile may reach over an edge and go on at
    the opposite one. A call of the latent's own shape whose values differ was changed by another node; it is the whole.
    """
    batch, (height, width) = latent.shape[0], latent.shape[-2:]
    size = (call.shape[-2], call.shape[-1])
    same_shape = size == (height, width) and call.shape[0] == chunks * batch
    if same_shape and (call is latent or torch.equal(call, latent.repeat(chunks, *[1] * (latent.ndim - 1)))):
        return _whole(chunks, batch)
    if call.ndim != 4 or size[0] > height or size[1] > width:
        return None
    found = [_place(row, latent) for row in call]
    if any(place is None for place in found):
        return _whole(chunks, batch) if same_shape else None
    groups: dict[tuple[int, int, int], tuple[list[int], list[int]]] = {}
    times: dict[tuple[int, int, int], int] = {}  # how often a place has come: with one prompt after another
    for row, place in enumerate(found):
        assert place is not None
        picture, top, left = place
        time = times[place] = times.get(place, -1) + 1
        rows, pictures = groups.setdefault((time % chunks, top, left), ([], []))
        if picture in pictures:  # a window that shows a picture twice; once is enough
            continue
        rows.append(row)
        pictures.append(picture)
    full = size == (height, width)
    return [
        Part(
            rows=torch.tensor(rows, device=latent.device),
            pictures=torch.tensor(pictures, device=latent.device),
            chunk=chunk,
            down=None if full else (torch.arange(size[0], device=latent.device) + top) % height,
            across=None if full else (torch.arange(size[1], device=latent.device) + left) % width,
        )
        for (chunk, top, left), (rows, pictures) in groups.items()
    ]


def _whole(chunks: int, batch: int) -> list[Part]:
    return [Part(rows=slice(n * batch, (n + 1) * batch), chunk=n) for n in range(chunks)]


def _place(row: Tensor, latent: Tensor) -> tuple[int, int, int] | None:
    """Picture, top and left of a row (C, h, w) in the latent; it may reach over the edges."""
    height, width = latent.shape[-2:]
    matches = (latent == row[:, :1, :1]).all(1).nonzero().tolist()  # of its first cell
    for picture, top, left in matches:
        down = (torch.arange(row.shape[-2], device=latent.device) + top) % height
        across = (torch.arange(row.shape[-1], device=latent.device) + left) % width
        if torch.equal(latent[picture][:, down[:, None], across], row):
            return picture, top, left
    return None
