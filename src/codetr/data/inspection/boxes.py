"""Faults of boxes, one by one and of the file as a whole."""

from __future__ import annotations

import numpy as np

from codetr.data.inspection.records import numbers
from codetr.data.inspection.split import Split

_LONG = 20  # longer side to shorter side
_MANY = 5  # boxes from which on a habit of the whole file can be told
_WHOLE = 0.99  # of the image's sides


def inspect_boxes(split: Split) -> None:
    """Every box gets at most one of the kinds, except for repetitions."""
    rows, boxes, extents = [], [], []
    for i, record in enumerate(split.annotations):
        box = numbers(record.get("bbox"), 4)
        image = split.image_of(i)
        if box is None:
            what = f"{split.annotation_name(i)}: bbox {record.get('bbox')!r}"
            split.drop_annotation(i, "box that is not 4 finite numbers", what)
        elif image is not None:
            split.boxes[i] = (box[0], box[1], box[2], box[3])
            rows.append(i)
            boxes.append(box)
            extents.append(split.size(image))
    if rows:
        table, extent = np.array(boxes), np.array(extents, np.float64)
        _inspect_each(split, np.array(rows), table, extent)
        _inspect_habits(split, table, extent)
        _inspect_repetitions(split)


def _inspect_each(split: Split, rows: np.ndarray, boxes: np.ndarray, extent: np.ndarray) -> None:
    """rows: [n] positions; boxes: [n, 4] xywh; extent: [n, 2] (width, height) of their images."""
    low, side = boxes[:, :2], boxes[:, 2:]
    with np.errstate(over="ignore"):
        high = low + side
    inverted, flat = (side < 0).any(1), (side == 0).any(1)
    outside = ((low >= extent) | (high <= 0)).any(1)
    overhang = np.maximum(-low, high - extent).max(1)
    clipped = np.clip(np.stack([low, high], 1), 0, extent[:, None])
    visible = clipped[:, 1] - clipped[:, 0]
    longer, shorter = side.max(1), np.maximum(side.min(1), 1e-9)
    kinds = [
        ("inverted box", inverted),
        ("box without area", flat),
        ("box outside its image", outside),
        ("box that reaches out of its image", overhang > 1),
        ("box less than a pixel out of its image", overhang > 1e-3),
        ("box smaller than a pixel", (visible < 1).any(1)),
        ("box as large as its image", (visible >= _WHOLE * extent).all(1)),
        ("very long box", longer > _LONG * shorter),
    ]
    kind_of = np.select([hit for _, hit in kinds], np.arange(len(kinds)), -1)
    for j in (kind_of >= 0).nonzero()[0]:
        i, kind = int(rows[j]), kinds[kind_of[j]][0]
        width, height = extent[j]
        what = f"{split.annotation_name(i)}: bbox {_short(boxes[j])} in {width:.0f}x{height:.0f}"
        if kind_of[j] <= 2:
            split.drop_annotation(i, kind, what)
        elif kind_of[j] <= 4:
            split.change(i, kind, what, bbox=[*clipped[j, 0].tolist(), *visible[j].tolist()])
        else:
            split.add(kind, what, split.picture(i))


def _short(box: np.ndarray) -> str:
    return f"[{', '.join(f'{v:.6g}' for v in box)}]"


def _inspect_habits(split: Split, boxes: np.ndarray, extent: np.ndarray) -> None:
    """Files that write all their boxes otherwise than COCO does."""
    if len(boxes) < _MANY:
        return
    if (np.abs(boxes) <= 1.01).all():
        split.add("boxes that look like fractions", f"all {len(boxes)} boxes lie between 0 and 1")
        return
    reach_out = (boxes[:, :2] + boxes[:, 2:] > extent + 1).any(1).mean()
    corners = ((boxes[:, 2:] > boxes[:, :2]) & (boxes[:, 2:] <= extent + 1)).all(1).mean()
    if reach_out > 0.2 and corners > 0.95:
        split.add(
            "boxes that look like corners",
            f"{reach_out:.0%} of {len(boxes)} boxes reach out of their image, and {corners:.0%} would not as corners",
        )


def _inspect_repetitions(split: Split) -> None:
    seen: dict[tuple[object, ...], int] = {}
    for i, box in split.boxes.items():
        record = split.annotations[i]
        key = (record["image_id"], *box)
        first = seen.setdefault(key, i)
        if first == i:
            continue
        same = split.annotations[first].get("category_id") == record.get("category_id")
        kind = "same box twice" if same else "same box with two categories"
        what = f"{split.annotation_name(i)} and annotation {split.annotations[first].get('id')}"
        split.add(kind, what, split.picture(i))
