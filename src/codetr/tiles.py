"""Large images in tiles: where the tiles lie, and detection tile by tile.

Tiles of one size cover an image, neighbours overlap. Half of an overlap belongs to each side: that makes a core of
every tile, and each point of the image lies in one core. A detection counts where its centre lies in the core of its
tile, so that an object no larger than the overlap is found by a tile that sees all of it, and by no other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise, product

import torch
from torch import Tensor
from torchvision.ops import box_iou

from codetr.errors import UserError
from codetr.types import Detections

Found = Mapping[str, list[Detections]]
"""What was found in each image, by name of who found it."""


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


@dataclass(frozen=True)
class Tiles:
    """Detection in overlapping tiles of an image in place of the whole, for images much larger than those of training.

    size: height and width of a tile in network pixels; a smaller image is one tile of its own size.
    overlap: the share of `size` that neighbours overlap by, at least; as much as the largest objects, best.
    iou: of two detections of a class from different tiles that overlap by more, the better one is left. Within a tile
        nothing is dropped: that is for `postprocess`.
    batch_size: tiles that the network sees at once.

    Raises UserError for values that are none.
    """

    size: int
    overlap: float
    iou: float
    batch_size: int

    def __post_init__(self) -> None:
        if self.size < 1 or self.batch_size < 1:
            raise UserError(f"tiles: size={self.size}, batch_size={self.batch_size}: must be 1 or more")
        if not 0 <= self.overlap <= 0.5:
            raise UserError(f"tiles.overlap={self.overlap}: must be from 0 to 0.5, a share of the size of a tile")

    def __call__(self, detect: Callable[[Tensor, Tensor, Tensor], Found], images: Tensor, sizes: Tensor) -> Found:
        """What `detect` finds in all tiles, in pixels of the images.

        detect: (tiles [n, 3, h, w], padding [n, h, w], sizes [n, 2]) -> what it finds in each, in pixels of the tile.
        images: [B, 3, H, W], padded right and below. sizes: [B, 2] (height, width) without the padding.
        """
        joined: dict[str, list[Detections]] = {}
        for image, (height, width) in zip(images, sizes.tolist(), strict=True):
            for name, found in self._in_image(detect, image[:, : int(height), : int(width)]).items():
                joined.setdefault(name, []).append(found)
        return joined

    def _in_image(self, detect: Callable[[Tensor, Tensor, Tensor], Found], image: Tensor) -> dict[str, Detections]:
        rows, columns = (starts(length, self.size, self.overlap) for length in image.shape[1:])
        corners = list(product(rows, columns))
        found: dict[str, list[Detections]] = {}
        for first in range(0, len(corners), self.batch_size):
            own = [image[:, y : y + self.size, x : x + self.size] for y, x in corners[first : first + self.batch_size]]
            tiles = torch.stack(own)
            sizes = torch.tensor([tiles.shape[-2:]] * len(own), device=image.device)
            padding = torch.zeros(len(own), *tiles.shape[-2:], dtype=torch.bool, device=image.device)
            for name, of_tiles in detect(tiles, padding, sizes).items():
                found.setdefault(name, []).extend(of_tiles)
        return {name: self._join(of_tiles, rows, columns) for name, of_tiles in found.items()}

    def _join(self, found: list[Detections], rows: list[int], columns: list[int]) -> Detections:
        """The detections of all tiles, row by row, of one image: best first, none twice."""
        device = found[0].scores.device
        tile = torch.cat([torch.full_like(one.labels, i) for i, one in enumerate(found)])
        corners = torch.tensor([(x, y, x, y) for y, x in product(rows, columns)], device=device)
        boxes = torch.cat([one.boxes_xyxy for one in found]) + corners[tile]
        scores, labels = (torch.cat([getattr(one, part) for one in found]) for part in ("scores", "labels"))
        centers = (boxes[:, :2] + boxes[:, 2:]) / 2
        cores = [torch.tensor(boundaries(begins, self.size), device=device) for begins in (columns, rows)]
        column, row = (torch.bucketize(centers[:, i].contiguous(), cores[i].to(centers)) for i in (0, 1))
        kept = (row * len(columns) + column == tile).nonzero()[:, 0]
        kept = kept[scores[kept].argsort(descending=True, stable=True)]
        boxes, scores, labels, tile = (x[kept] for x in (boxes, scores, labels, tile))
        left = unique_across(boxes, labels, tile, self.iou)
        return Detections(scores[left], labels[left], boxes[left])


def refuse_masks(tiles: Tiles | None, masks: object | None) -> None:
    """masks: what finds some, None where nothing does. Raises UserError for tiles with masks."""
    if tiles is not None and masks is not None:
        raise UserError("tiles: masks are not put together from tiles; detect in whole images, tiles=null")


def unique_across(boxes: Tensor, labels: Tensor, tile: Tensor, iou: float) -> Tensor:
    """[n] bool: what is left when, best first, each detection drops those of its class from other tiles that it
    overlaps by more than `iou`. boxes: [n, 4], best first. labels, tile: [n]."""
    better, worse = _pairs(boxes, labels, tile, iou)
    left = torch.ones_like(labels, dtype=torch.bool)
    while True:  # ends: after n rounds the first n are as they will stay
        after = torch.ones_like(left).index_fill(0, worse[left[better]], False)
        if torch.equal(after, left):
            return left
        left = after


def _pairs(boxes: Tensor, labels: Tensor, tile: Tensor, iou: float) -> tuple[Tensor, Tensor]:
    """Indices of the better and of the worse ones that meet. By tile: all pairs at once would not fit into memory."""
    found = [torch.empty(2, 0, dtype=torch.long, device=boxes.device)]
    for own in tile.unique():
        (mine,), (others,) = (tile == own).nonzero(as_tuple=True), (tile > own).nonzero(as_tuple=True)
        meet = (box_iou(boxes[mine], boxes[others]) > iou) & (labels[mine, None] == labels[others])
        a, b = meet.nonzero(as_tuple=True)
        found.append(torch.stack([mine[a], others[b]]))
    better, worse = torch.cat(found, 1).sort(0).values
    return better, worse
