"""Images with their objects, cut into overlapping tiles of one size."""

from __future__ import annotations

from collections import Counter
from itertools import product
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from codetr.data.images import read_image
from codetr.data.readers.folder import progress
from codetr.data.segmentations import decode, run_lengths
from codetr.data.writers import Record, Split
from codetr.errors import UserError
from codetr.views.kinds import starts

_JPEG_QUALITY = 95
TOO_SMALL, NEVER_WHOLE = "parts too small to be trained or counted", "objects that no tile shows whole"


class Tile(NamedTuple):
    """x, y: of its upper left corner in the image, in pixels."""

    x: int
    y: int
    width: int
    height: int

    def holds(self, box: list[float]) -> bool:
        """All of it. box: [x, y, width, height] in the image."""
        x, y, width, height = box
        across = self.x <= x and x + width <= self.x + self.width
        return across and self.y <= y and y + height <= self.y + self.height

    def shows(self, box: list[float]) -> bool:
        """Some of it."""
        x, y, width, height = box
        across = self.x < x + width and x < self.x + self.width
        return across and self.y < y + height and y < self.y + self.height


def tiles_of(size: tuple[int, int], side: int, overlap: float) -> list[Tile]:
    """Row by row. size: (height, width) of the image. side, overlap: see `codetr.views.kinds.starts`."""
    height, width = size
    corners = product(starts(height, side, overlap), starts(width, side, overlap))
    return [Tile(x, y, min(side, width), min(side, height)) for y, x in corners]


def cut(record: Record, mask: np.ndarray | None, tile: Tile, visible: float) -> Record | None:
    """The part of an object that a tile shows, None where it shows nothing.

    The box is cut off at the tile's sides; with a mask it is drawn around what is left of the mask. With less than the
    share `visible` of its area in the tile, an object is ignored there: neither trained nor counted. A crowd stays one.

    record: of the object, in the words of COCO. mask: [H, W] of the image, 1 on the object.
    """
    if mask is None:
        x, y, width, height = record["bbox"]
        left, top = max(x - tile.x, 0), max(y - tile.y, 0)
        right, bottom = min(x + width - tile.x, tile.width), min(y + height - tile.y, tile.height)
        whole, area, more = width * height, max(right - left, 0) * max(bottom - top, 0), {}
    else:
        seen = mask[tile.y : tile.y + tile.height, tile.x : tile.x + tile.width]
        (left, right), (top, bottom) = _extent(seen, 0), _extent(seen, 1)
        whole, area, more = int(mask.sum()), int(seen.sum()), {"segmentation": run_lengths(seen)}
    if area <= 0:
        return None
    small = area < visible * whole and not record.get("iscrowd")
    ignored = int(small or bool(record.get("ignore")))
    return record | more | {"bbox": [left, top, right - left, bottom - top], "area": area, "ignore": ignored}


def _extent(seen: np.ndarray, axis: Literal[0, 1]) -> tuple[int, int]:
    """Of a mask [h, w]: the first column (0) or row (1) that it touches, and the one behind the last."""
    (places,) = np.atleast_1d(seen.any(axis)).nonzero()
    return (int(places[0]), int(places[-1]) + 1) if len(places) else (0, 0)


def tile_split(split: Split, folder: Path, side: int, overlap: float, visible: float) -> tuple[Split, Counter[str]]:
    """Write the tiles of a split's images into `folder`; returns the split of the tiles, and counts for the user.

    Each tile's record says which `tile` of which image it is: [file name, x, y]. PNGs become PNGs, all else JPEGs.
    Raises UnreadableImage, and UserError for two images whose tiles would be one file.
    """
    tiled = Split(folder, split.categories, [], [], {})
    tally = Counter({TOO_SMALL: 0, NEVER_WHOLE: 0})
    for image, objects in progress(split.by_image(), len(split.images), "and cutting images"):
        size = image["height"], image["width"]
        tiles = tiles_of(size, side, overlap)
        first = len(tiled.images) + 1
        records = [_record(split.names[image["id"]], tile, number) for number, tile in enumerate(tiles, first)]
        tiled.images += records
        pixels = read_image(split.root / image["file_name"], size).permute(1, 2, 0).numpy()
        _save(pixels, tiles, [folder / record["file_name"] for record in records])
        for record in objects:
            parts = _parts(record, size, tiles, visible)
            tiled.annotations += [part | {"image_id": first + place} for place, part in parts.items()]
            tally[TOO_SMALL] += sum(part["ignore"] for part in parts.values())
            tally[NEVER_WHOLE] += not any(tile.holds(record["bbox"]) for tile in tiles)
    tiled.names = {image["id"]: image["file_name"] for image in tiled.images}
    return tiled, tally


def _record(name: str, tile: Tile, number: int) -> Record:
    path = PurePosixPath(name)
    suffix = ".png" if path.suffix.lower() == ".png" else ".jpg"
    own = path.with_name(f"{path.stem}_{tile.y}_{tile.x}{suffix}").as_posix()
    return {"id": number, "file_name": own, "width": tile.width, "height": tile.height, "tile": [name, tile.x, tile.y]}


def _save(pixels: np.ndarray, tiles: list[Tile], paths: list[Path]) -> None:
    for (x, y, width, height), path in zip(tiles, paths, strict=True):
        if path.exists():
            raise UserError(f"{path.name} would be a tile of two images that differ in their suffix: rename one")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[y : y + height, x : x + width]).save(path, quality=_JPEG_QUALITY)


def _parts(record: Record, size: tuple[int, int], tiles: list[Tile], visible: float) -> dict[int, Record]:
    """What each tile shows of an object, by the tile's place in the list."""
    mask = decode(record["segmentation"], size) if record.get("segmentation") else None
    parts = {i: cut(record, mask, tile, visible) for i, tile in enumerate(tiles) if tile.shows(record["bbox"])}
    return {place: part for place, part in parts.items() if part is not None}
