"""Kinds of views: what they show of a picture, and how what is found in them is put together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise, product
from typing import Any

from codetr.data.geometry import Window
from codetr.errors import UserError
from codetr.types import Detections
from codetr.views.borders import joined
from codetr.views.merging import NMS, Merge
from codetr.views.seen import Seen
from codetr.views.view import EVERYWHERE, Found, Part, Picture, See, View

Track = Callable[[Iterable[Any], int], Iterable[Any]]
"""Passes so many items on, and shows how far it is."""


def untracked(items: Iterable[Any], total: int) -> Iterable[Any]:
    return items


@dataclass(frozen=True, kw_only=True)
class Views(ABC):
    """Detection in several views of a picture in place of the picture. A kind of your own says which, in `of`.

    merge: what becomes of the detections of an object in several views (see `codetr.views.merging`).
    batch_size: views that are looked at at once.
    """

    merge: Merge = field(default_factory=NMS)
    batch_size: int = 4

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"views: batch_size={self.batch_size}: must be 1 or more")

    @abstractmethod
    def of(self, size: tuple[int, int]) -> list[View]:
        """The views of a picture of (height, width) `size`."""

    def __call__(self, see: See, pictures: Sequence[Picture], track: Track = untracked) -> list[Found]:
        """What `see` finds in the views of each picture, in pixels of the picture. A part is read when its turn comes.

        track: shows how far it is.
        """
        views = [self.of(picture.size) for picture in pictures]
        found: list[dict[str, list[Detections]]] = [{} for _ in pictures]
        places: list[dict[str, list[int]]] = [{} for _ in pictures]
        batches = list(self._batches(views))
        for batch in track(batches, len(batches)):
            parts = [Part(pictures[i], views[i][k]) for i, k in batch]
            for (i, k), part, one in zip(batch, parts, see(parts), strict=True):
                for name, own in one.items():
                    found[i].setdefault(name, []).append(part.view.back(own, pictures[i].size))
                    places[i].setdefault(name, []).append(k)
        return [
            {name: self._merged(found[i][name], views[i], places[i][name], picture.size) for name in found[i]}
            for i, picture in enumerate(pictures)
        ]

    def _batches(self, views: Sequence[Sequence[View]]) -> Iterator[list[tuple[int, int]]]:
        """Numbers of picture and view. Those of a batch are of one size, so that none is padded to another's."""
        places = [(i, k) for i, own in enumerate(views) for k in range(len(own))]

        def shape(place: tuple[int, int]) -> tuple[float, int, int]:
            view = views[place[0]][place[1]]
            return view.zoom, view.window.height, view.window.width

        for _, alike in groupby(sorted(places, key=shape), shape):
            group = list(alike)
            yield from (group[start : start + self.batch_size] for start in range(0, len(group), self.batch_size))

    def _merged(
        self, found: Sequence[Detections], views: Sequence[View], places: Sequence[int], size: tuple[int, int]
    ) -> Detections:
        if len(found) == 1:
            return found[0]
        return self.merge(joined(Seen.of(found, [views[k] for k in places], size)))


@dataclass(frozen=True, kw_only=True)
class Tiles(Views):
    """Overlapping tiles that cover a picture, for pictures much larger than those of training.

    Half of an overlap belongs to each side: that makes a core of every tile, and each point of the picture lies in one
    core. A detection counts where its centre lies in the core of its tile, so that an object no larger than the overlap
    is found by a tile that sees all of it, and by no other. Of a larger one, tiles find parts: see
    `codetr.views.borders`.

    size: height and width of a tile in pixels of the picture; a smaller picture is one tile of its own size.
    overlap: the share of `size` that neighbours overlap by, at least; as much as most objects, best.
    full: the whole picture is one more view, for objects larger than tiles.

    Raises UserError for values that are none.
    """

    size: int = 512
    overlap: float = 0.25
    full: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size < 1:
            raise UserError(f"tiles: size={self.size}: must be 1 or more")
        if not 0 <= self.overlap <= 0.5:
            raise UserError(f"tiles: overlap={self.overlap}: must be from 0 to 0.5, a share of the size of a tile")

    def of(self, size: tuple[int, int]) -> list[View]:
        height, width = (min(self.size, side) for side in size)
        rows, columns = (list(self._side(length)) for length in size)
        found = [
            View(Window(top, left, height, width), core=(x0, y0, x1, y1))
            for (top, y0, y1), (left, x0, x1) in product(rows, columns)
        ]
        # Last: what all tiles found is compared with few detections of its own.
        return [*found, View(Window(0, 0, *size))] if self.full and len(found) > 1 else found

    def _side(self, length: int) -> Iterator[tuple[int, float, float]]:
        """Where each tile begins, and where its core begins and ends."""
        begins = starts(length, self.size, self.overlap)
        edges = [EVERYWHERE[0], *boundaries(begins, self.size), EVERYWHERE[2]]
        yield from ((begin, *core) for begin, core in zip(begins, pairwise(edges), strict=True))


def starts(length: int, tile: int, overlap: float) -> list[int]:
    """Where tiles of `tile` pixels begin on a side of `length` pixels: as few as overlap by at least the share
    `overlap` of their size, evenly spread; one, at 0, where the side is no longer than a tile."""
    if length <= tile:
        return [0]
    shared = round(tile * overlap)
    gaps = -(-(length - tile) // (tile - shared))
    return [round(i * (length - tile) / gaps) for i in range(gaps + 1)]


def boundaries(begins: list[int], tile: int) -> list[float]:
    """Where the cores of neighbouring tiles meet: in the middle of what both see. [n] -> [n - 1]."""
    return [(a + b + tile) / 2 for a, b in pairwise(begins)]


@dataclass(frozen=True, kw_only=True)
class TTA(Views):
    """Test-time augmentation: the whole picture at several scales, each also mirrored.

    scales: network pixels, times those that the model's transform makes.
    flip, vertical_flip: each scale also with left and right, top and bottom exchanged.

    Raises UserError for values that are none.
    """

    scales: Sequence[float] = (0.75, 1.0, 1.25)
    flip: bool = True
    vertical_flip: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "scales", tuple(map(float, self.scales)))
        if not self.scales or not all(0.05 <= scale <= 20 for scale in self.scales):
            raise UserError(f"tta: scales={list(self.scales)}: give factors of the model's own scale, [0.75,1,1.25]")

    def of(self, size: tuple[int, int]) -> list[View]:
        mirrored = [range(1 + one) for one in (self.flip, self.vertical_flip)]
        return [
            View(Window(0, 0, *size), bool(flip), bool(vertical), zoom=scale)
            for scale, flip, vertical in product(self.scales, *mirrored)
        ]
