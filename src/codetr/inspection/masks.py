"""Faults of masks: polygons and run lengths that cannot be read, are empty, or lie elsewhere than their box."""

from __future__ import annotations

from typing import Any

from pycocotools import mask as coco_mask

from codetr.data import segmentations
from codetr.data.findings import Box, Picture
from codetr.inspection.split import Split

_PIXELS, _SHARE = 3.0, 0.15  # how far a mask's side may lie from its box's, in pixels and in the box's own side


def inspect_masks(split: Split) -> None:
    """Objects without any segmentation are named only where masks are read, or where most objects have one."""
    present = sum(bool(a.get("segmentation")) for a in split.annotations)
    expected = split.findings.masks or 2 * present > len(split.annotations)
    for i, record in enumerate(split.annotations):
        image, mask = split.image_of(i), record.get("segmentation")
        if image is None or (not mask and (not expected or record.get("iscrowd", 0))):
            continue
        width, height = split.size(image)
        wrong = segmentations.fault(mask, (height, width))
        if wrong and record.get("iscrowd", 0):
            continue  # covers its box
        if wrong:
            _unusable(split, i, "object without a usable mask", wrong)
            continue
        bounds = _bounds(mask, (height, width))
        if bounds is None:
            _unusable(split, i, "mask without area", "covers no pixel")
        elif i in split.boxes and i not in split.repair.annotations and not _agree(bounds, split.boxes[i]):
            _disagreement(split, i, bounds)


def _disagreement(split: Split, position: int, bounds: Box) -> None:
    mask, box = (f"[{', '.join(f'{v:.6g}' for v in b)}]" for b in (bounds, split.boxes[position]))
    picture, (x, y, w, h) = split.picture(position), bounds
    if picture:
        picture = Picture(picture.path, picture.box, other=(x, y, x + w, y + h))
    what = f"{split.annotation_name(position)}: mask in {mask}, bbox {box}"
    split.add("mask that disagrees with its box", what, picture)


def _unusable(split: Split, position: int, kind: str, wrong: str) -> None:
    what = f"{split.annotation_name(position)}: {wrong}"
    if split.findings.masks:
        split.drop_annotation(position, kind, what)
    else:
        split.add(kind, what, split.picture(position))


def _bounds(mask: Any, size: tuple[int, int]) -> Box | None:
    """The mask's extent (x, y, width, height); None if it covers nothing."""
    if isinstance(mask, list):  # short lists: plain Python is faster than arrays
        x = [v for polygon in mask for v in polygon[::2]]
        y = [v for polygon in mask for v in polygon[1::2]]
        bounds = float(min(x)), float(min(y)), float(max(x) - min(x)), float(max(y) - min(y))
        return bounds if any(map(_has_area, mask)) else None
    rle = coco_mask.frPyObjects(mask, *size) if isinstance(mask["counts"], list) else mask
    x, y, w, h = coco_mask.toBbox(rle).tolist()
    return (x, y, w, h) if w and h else None


def _has_area(polygon: list[float]) -> bool:
    """x and y in turn. Relative to the first corner, where rounding is smallest."""
    x = [v - polygon[0] for v in polygon[::2]]
    y = [v - polygon[1] for v in polygon[1::2]]
    return abs(sum(a * d - b * c for a, b, c, d in zip(x, y, x[1:], y[1:], strict=False))) > 1e-6


def _agree(bounds: Box, box: Box) -> bool:
    return all(
        abs(bounds[i] - box[i]) <= (allowed := max(_PIXELS, _SHARE * box[i + 2]))
        and abs(bounds[i] + bounds[i + 2] - box[i] - box[i + 2]) <= allowed
        for i in (0, 1)
    )
