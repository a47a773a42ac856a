"""COCO segmentations: polygons or run lengths, kept small and decoded one image at a time."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor


class Segmentations:
    """The segmentations of many objects in one buffer, which worker processes share and no reference count touches."""

    def __init__(self, segmentations: Iterable[Any]) -> None:
        packed = [pickle.dumps(_compact(s)) for s in segmentations]
        self._bytes = np.frombuffer(b"".join(packed), np.uint8)
        self._offsets = np.cumsum([0, *map(len, packed)])

    def masks(self, rows: Sequence[int] | np.ndarray, size: tuple[int, int]) -> Tensor:
        """[n, H, W] uint8, 1 on the object, of the objects `rows` of an image of (height, width) `size`."""
        if not len(rows):
            return torch.zeros(0, *size, dtype=torch.uint8)
        return torch.from_numpy(coco_mask.decode(self.runs(rows, size))).permute(2, 0, 1)

    def runs(self, rows: Sequence[int] | np.ndarray, size: tuple[int, int]) -> list[dict[str, Any]]:
        """Compressed run lengths {size, counts} of the objects `rows` of an image of (height, width) `size`."""
        return [_runs(self._segmentation(row), size) for row in rows]

    def _segmentation(self, row: int) -> Any:
        return pickle.loads(self._bytes[self._offsets[row] : self._offsets[row + 1]].data)


def _compact(segmentation: Any) -> Any:
    """Coordinates in half the bytes; 32 bits place them to a thousandth of a pixel."""
    return [np.array(p, np.float32) for p in segmentation] if isinstance(segmentation, list) else segmentation


def _runs(segmentation: Any, size: tuple[int, int]) -> dict[str, Any]:
    """Compressed run lengths, whatever form the file has."""
    if isinstance(segmentation, list):
        polygons = [polygon.astype(np.float64).tolist() for polygon in segmentation]
        return coco_mask.merge(coco_mask.frPyObjects(polygons, *size))
    if isinstance(segmentation["counts"], list):
        return coco_mask.frPyObjects(segmentation, *size)
    return segmentation


def encode(masks: Tensor) -> list[dict[str, Any]]:
    """Compressed run lengths {size: [H, W], counts: str} of [n, H, W] bool masks on any device."""
    # Column by column, as COCO counts; turned where the masks are, in a layout that the encoder takes as it is.
    columns = masks.transpose(1, 2).contiguous().view(torch.uint8).cpu().numpy()
    return [{**runs, "counts": runs["counts"].decode()} for runs in coco_mask.encode(columns.transpose(2, 1, 0))]


def fault(segmentation: Any, size: tuple[int, int]) -> str | None:
    """What is wrong with a segmentation of an image of (height, width) `size`; None if it can be decoded."""
    if segmentation is None or segmentation == []:
        return "no segmentation"
    if isinstance(segmentation, list):
        good = all(isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0 for p in segmentation)
        if not good or not all(type(c) in (int, float) for p in segmentation for c in p):
            return "polygons that are not lists [x1, y1, x2, y2, x3, y3, ...] of three points or more"
        return None if np.isfinite(np.concatenate(segmentation)).all() else "polygons with a number that is not finite"
    if not isinstance(segmentation, dict) or not isinstance(segmentation.get("counts"), (list, str)):
        return "neither polygons nor run lengths {size, counts}"
    if tuple(segmentation.get("size", ())) != size:
        return f"run lengths of size {segmentation.get('size')} in an image of {list(size)} (height, width)"
    runs = segmentation["counts"]
    if isinstance(runs, list) and (not all(type(r) is int and r >= 0 for r in runs) or sum(runs) != size[0] * size[1]):
        return f"run lengths that do not add up to {size[0]} x {size[1]} pixels"
    return None
