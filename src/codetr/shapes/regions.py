"""Masks as COCO writes them: polygons, run lengths, boxes."""

from __future__ import annotations

from typing import Any

import numpy as np
from pycocotools import mask as coco_mask


def run_lengths(mask: np.ndarray) -> dict[str, Any]:
    """Uncompressed RLE of a mask [H, W]: lengths of the runs down the columns, zeros first."""
    flat = mask.ravel(order="F")
    changes = np.flatnonzero(np.diff(flat, prepend=False)).tolist()
    counts = np.diff([0, *changes, flat.size])
    return {"size": list(mask.shape), "counts": counts.tolist()}


def box(mask: np.ndarray) -> list[int]:
    """[x, y, width, height], tight around a mask that is not empty."""
    x, y = (np.flatnonzero(mask.any(axis)) for axis in (0, 1))
    return [int(x[0]), int(y[0]), int(x[-1] - x[0] + 1), int(y[-1] - y[0] + 1)]


def loops(mask: np.ndarray) -> list[np.ndarray]:
    """The borders of a mask [H, W], each [n, 2] (x, y), along the edges of its pixels; exact.

    A vertex is where the border turns. In each row of vertices, sorted by x, the first and the second are the ends
    of a horizontal side, the third and the fourth of the next, and so on; likewise in each column. Following
    horizontal and vertical sides in turn walks a border. Where two pixels of the mask touch only at a corner, two
    borders turn: that vertex is listed twice, in such an order that the pixels hang together.
    """
    padded = np.pad(mask.astype(np.int8), 1)
    a, b, c, d = padded[:-1, :-1], padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    touch = (a == d) & (b == c) & (a != b)
    y, x = np.nonzero(((a + b + c + d) % 2 == 1) | touch)
    repeats = 1 + touch[y, x]
    falling = np.repeat(a[y, x] == 1, repeats) & np.repeat(touch[y, x], repeats)
    y, x = np.repeat(y, repeats), np.repeat(x, repeats)
    # Rows come sorted. In the columns the right one of a falling pair comes first: it owns the upper side.
    columns = np.lexsort((np.where(falling, -np.arange(len(x)), np.arange(len(x))), y, x))
    along_row = (np.arange(len(x)) ^ 1).tolist()
    along_column = np.empty(len(x), int)
    along_column[columns] = columns[np.arange(len(x)) ^ 1]
    return [np.stack([x[loop], y[loop]], 1) for loop in _walk(along_row, along_column.tolist())]


def _walk(along_row: list[int], along_column: list[int]) -> list[list[int]]:
    found, seen = [], [False] * len(along_row)
    for start in range(len(seen)):
        loop, i = [], start
        while not seen[i]:
            j = along_row[i]
            seen[i] = seen[j] = True
            loop += [i, j]
            i = along_column[j]
        if loop:
            found.append(loop)
    return found


def segmentation(mask: np.ndarray, crowd: bool) -> Any:
    """A crowd as uncompressed RLE; an object as polygons, one per piece, or as compressed RLE when it has holes."""
    if crowd:
        return run_lengths(mask)
    borders = loops(mask)
    # The first side of a border goes right along its top: pixels are below it, unless it is the border of a hole.
    if all(mask[y, x] for x, y in (border[0] for border in borders)):
        return [border.ravel().tolist() for border in borders]
    encoded = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return {"size": list(mask.shape), "counts": encoded["counts"].decode("ascii")}
