"""Faults of boxes, one by one and of the file as a whole."""

from __future__ import annotations

import numpy as np

from codetr.data.inspection.records import numbers
from codetr.data.inspection.split import Split
from codetr.data.rules import BOX_KINDS, KINDS, REFUSED_BOXES, Habits, box_kinds, clip
from codetr.data.values import flag


def inspect_boxes(split: Split) -> None:
    """Every box gets at most one of the kinds, except for repetitions."""
    rows, boxes, extents = [], [], []
    for i, record in enumerate(split.annotations):
        box = numbers(record.get("bbox"), 4)
        image = split.image_of(i)
        if box is None:
            what = f"{split.annotation_name(i)}: bbox {record.get('bbox')!r}"
            split.drop_annotation(i, BOX_KINDS[0], what)
        elif image is not None:
            split.boxes[i] = (box[0], box[1], box[2], box[3])
            rows.append(i)
            boxes.append(box)
            extents.append(split.size(image))
    if rows:
        table, extent = np.array(boxes), np.array(extents, np.float64)
        _inspect_each(split, rows, table, extent)
        _inspect_habits(split, rows, table, extent)
        _inspect_repetitions(split)


def _inspect_each(split: Split, rows: list[int], boxes: np.ndarray, extent: np.ndarray) -> None:
    """rows: [n] positions; boxes: [n, 4] xywh; extent: [n, 2] (width, height) of their images."""
    kinds, clipped = box_kinds(boxes, extent), clip(boxes, extent)
    for j in (kinds >= 0).nonzero()[0].tolist():
        i, kind = rows[j], BOX_KINDS[kinds[j]]
        width, height = extent[j]
        what = f"{split.annotation_name(i)}: bbox {_short(boxes[j])} in {width:.0f}x{height:.0f}"
        if kinds[j] < REFUSED_BOXES:
            split.drop_annotation(i, kind, what)
        elif KINDS[kind].mend:
            split.change(i, kind, what, bbox=clipped[j].tolist())
        else:
            split.add(kind, what, split.picture(i))


def _short(box: np.ndarray) -> str:
    return f"[{', '.join(f'{v:.6g}' for v in box)}]"


def _inspect_habits(split: Split, rows: list[int], boxes: np.ndarray, extent: np.ndarray) -> None:
    """Files that write all their objects otherwise than COCO does."""
    names = {c["id"]: str(c.get("name")) for c in split.categories if type(c.get("id")) is int}
    place = {key: position for position, key in enumerate(names)}
    records = [split.annotations[i] for i in rows]
    known = np.array([r.get("category_id") in place for r in records])
    category = np.array([place[r["category_id"]] for r, k in zip(records, known, strict=True) if k], np.int64)
    crowd = np.array([flag(r.get("iscrowd")) == 1 for r in records])[known]
    habits = Habits(len(names))
    habits.count(boxes[known], extent[known], category, crowd)
    for kind, why in habits.found(list(names.values())).items():
        split.add(kind, why)


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
