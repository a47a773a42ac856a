"""COCO segmentations: polygons or run lengths, kept small and decoded one image at a time.

One object's bytes: nothing; or a letter, the number of polygons and the number of coordinates of each as int32, and
all coordinates, after H as int32 hundredths of a pixel, which is how COCO and LVIS write them, after P as float64; or
R and compressed run lengths. Decoded coordinates are those of the file to the last bit: pycocotools rounds them to
fifths of a pixel, and half of one is not rare.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from math import isfinite
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

_HUNDREDTHS, _POLYGONS, _RUNS = b"H", b"P", b"R"


@dataclass(frozen=True)
class Segmentations:
    """Segmentations of many objects: of row i, packed[offsets[i] : offsets[i + 1]], as `pack` makes them."""

    packed: np.ndarray
    offsets: np.ndarray

    def masks(self, rows: Sequence[int] | np.ndarray, size: tuple[int, int]) -> Tensor:
        """[n, H, W] uint8, 1 on the object, of the objects `rows` of an image of (height, width) `size`."""
        if not len(rows):
            return torch.zeros(0, *size, dtype=torch.uint8)
        return torch.from_numpy(coco_mask.decode(self.rle(rows, size))).permute(2, 0, 1)

    def rle(self, rows: Sequence[int] | np.ndarray, size: tuple[int, int]) -> list[dict[str, Any]]:
        """Compressed run lengths {size, counts} of the objects `rows` of an image of (height, width) `size`."""
        return [_rle(self.packed[self.offsets[r] : self.offsets[r + 1]].tobytes(), size) for r in rows]


def pack(segmentations: Sequence[Any], sizes: Sequence[tuple[int, int]]) -> list[bytes]:
    """Segmentations without `fault` as bytes. sizes: (height, width) of their images."""
    outlines = iter(_pack_polygons([s for s in segmentations if isinstance(s, list)]))
    pairs = zip(segmentations, sizes, strict=True)
    return [next(outlines) if isinstance(s, list) else _pack_runs(s, size) for s, size in pairs]


def _pack_polygons(objects: Sequence[list[list[float]]]) -> list[bytes]:
    numbers = np.fromiter(chain.from_iterable(chain.from_iterable(objects)), np.float64)
    ends = np.cumsum([0, *(sum(map(len, polygons)) for polygons in objects)])
    with np.errstate(invalid="ignore"):  # beyond 32 bits; then they differ
        hundredths = np.rint(numbers * 100).astype(np.int32)
    differ = np.concatenate([[0], np.cumsum(hundredths / 100 != numbers)])
    exact = (differ[ends[1:]] == differ[ends[:-1]]).tolist()
    forms = (_POLYGONS, numbers.data), (_HUNDREDTHS, hundredths.data)
    packed = []
    for polygons, kind, (start, end) in zip(objects, exact, pairwise(ends.tolist()), strict=True):
        letter, values = forms[kind]
        head = array("i", [len(polygons), *map(len, polygons)])
        packed.append(b"".join((letter, head, values[start:end])))
    return packed


def _pack_runs(segmentation: dict[str, Any], size: tuple[int, int]) -> bytes:
    if isinstance(segmentation["counts"], list):
        segmentation = coco_mask.frPyObjects(segmentation, *size)
    counts = segmentation["counts"]
    return _RUNS + (counts.encode() if isinstance(counts, str) else counts)


def _rle(packed: bytes, size: tuple[int, int]) -> dict[str, Any]:
    """Compressed run lengths of what `pack` made."""
    if packed[:1] == _RUNS:
        return {"size": list(size), "counts": packed[1:].decode()}
    number = int(np.frombuffer(packed, np.int32, 1, 1)[0])
    lengths = np.frombuffer(packed, np.int32, number, 5)
    hundredths = packed[:1] == _HUNDREDTHS
    numbers: np.ndarray = np.frombuffer(packed, np.int32 if hundredths else np.float64, offset=5 + 4 * number)
    coordinates = numbers / 100 if hundredths else numbers
    polygons = [p.tolist() for p in np.split(coordinates, np.cumsum(lengths)[:-1])]
    return coco_mask.merge(coco_mask.frPyObjects(polygons, *size))


def encode(masks: Tensor) -> list[dict[str, Any]]:
    """Compressed run lengths {size: [H, W], counts: str} of [n, H, W] bool masks on any device."""
    # Column by column, as COCO counts; turned where the masks are, in a layout that the encoder takes as it is.
    columns = masks.transpose(1, 2).contiguous().view(torch.uint8).cpu().numpy()
    return [{**rle, "counts": rle["counts"].decode()} for rle in coco_mask.encode(columns.transpose(2, 1, 0))]


def decode(segmentation: Any, size: tuple[int, int]) -> np.ndarray:
    """[H, W] uint8, 1 on the object, of one segmentation without `fault` in an image of (height, width) `size`."""
    (packed,) = pack([segmentation], [size])
    return coco_mask.decode(_rle(packed, size))


def placed(
    rle: dict[str, Any], corner: tuple[int, int], size: tuple[int, int], flips: tuple[int, ...] = ()
) -> dict[str, Any]:
    """Compressed run lengths of a part of an image -> of the image, which takes no memory for the image's pixels.

    corner: (top, left) of the part. size: (height, width) of the image. flips: dimensions of the part, 0 for rows and 1
    for columns, in which it was mirrored.
    """
    mask = np.flip(coco_mask.decode(rle), flips)
    steps = np.diff(np.pad(mask.T.astype(np.int8), ((0, 0), (1, 1))), axis=1)  # [columns, rows + 1]
    begins, ends = (
        (columns + corner[1]) * size[0] + rows + corner[0] for columns, rows in map(np.nonzero, (steps > 0, steps < 0))
    )
    apart = begins[1:] != ends[:-1]  # where a run goes on in the next column it is one
    begins, ends = begins[np.r_[True, apart][: len(begins)]], ends[np.r_[apart, True][: len(ends)]]
    marks = np.r_[0, np.stack([begins, ends], 1).ravel(), size[0] * size[1]]
    counts = np.diff(marks).tolist()
    counts = counts[:-1] if counts[-1] == 0 and len(counts) > 1 else counts
    found = coco_mask.frPyObjects({"size": list(size), "counts": counts}, *size)
    return {"size": list(size), "counts": found["counts"].decode()}


def run_lengths(mask: np.ndarray) -> dict[str, Any]:
    """Compressed run lengths {size: [H, W], counts: str} of one mask [H, W]."""
    rle = coco_mask.encode(np.asfortranarray(mask))
    return {"size": list(mask.shape), "counts": rle["counts"].decode()}


def fault(segmentation: Any, size: tuple[int, int]) -> str | None:
    """What is wrong with a segmentation of an image of (height, width) `size`; None if it can be decoded."""
    if segmentation is None or segmentation == []:
        return "no segmentation"
    if isinstance(segmentation, list):
        good = all(isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0 for p in segmentation)
        if not good or not set(map(type, chain.from_iterable(segmentation))) <= {int, float}:
            return "polygons that are not lists [x1, y1, x2, y2, x3, y3, ...] of three points or more"
        return None if _finite(chain.from_iterable(segmentation)) else "polygons with a number that is not finite"
    if not isinstance(segmentation, dict) or not isinstance(segmentation.get("counts"), (list, str)):
        return "neither polygons nor run lengths {size, counts}"
    if segmentation.get("size") not in (list(size), size):
        return f"run lengths of size {segmentation.get('size')} in an image of {list(size)} (height, width)"
    rle = segmentation["counts"]
    good = all(type(r) is int and r >= 0 for r in rle) if isinstance(rle, list) else rle.isascii()
    if not good or (sum(rle) if isinstance(rle, list) else _pixels(rle.encode())) != size[0] * size[1]:
        return f"run lengths that do not add up to {size[0]} x {size[1]} pixels"
    return None


def _finite(numbers: Iterable[float]) -> bool:
    try:
        return all(map(isfinite, numbers))
    except OverflowError:  # an integer beyond all floats
        return False


def _pixels(counts: bytes) -> int:
    """How many pixels compressed run lengths cover, -1 if that is no text of theirs; pycocotools trusts them blindly.

    Five bits per character, least significant first, the sixth set where the number goes on; from the fourth number
    on, differences to the number before the last.
    """
    code = np.frombuffer(counts, np.uint8).astype(np.int64) - 48
    if not len(code) or code.min() < 0 or code.max() > 63 or code[-1] & 32:
        return -1
    last = (code & 32) == 0
    number = np.cumsum(last) - last
    first = np.flatnonzero(np.r_[True, last[:-1]])
    place = 5 * (np.arange(len(code)) - first[number])
    if place.max() > 30:
        return -1
    values = np.bincount(number, (code & 31) << place).astype(np.int64)
    values -= np.where(code[last] & 16, 1 << (place[last] + 5), 0)
    for start in (1, 2):
        values[start::2] = np.cumsum(values[start::2])
    return int(values.sum()) if values.min() >= 0 else -1
