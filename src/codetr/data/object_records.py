"""The annotation records of a document as columns, checked batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from codetr.data import segmentations
from codetr.data.checks import Report, check_boxes

Columns = dict[str, np.ndarray]
_NO_INTEGER = -(2**63)
_UNKNOWN = -1


class ObjectRecords:
    """Turns batches of annotations into columns; what is wrong with the others goes into `report`.

    images: columns of the images; broken: `repr` of the ids of images that cannot be used, whose objects are left out
    without a word. categories: ids of all categories. masks: keep segmentations, and only objects with a usable one.
    """

    def __init__(self, images: Columns, broken: set[str], categories: np.ndarray, masks: bool, report: Report) -> None:
        self._images, self._categories = _Places(images["image_ids"]), _Places(categories)
        self._sizes, self._broken, self._masks, self._report = images["sizes"], broken, masks, report
        self._done = 0
        self._odd_ids: set[str] = set()

    def columns(self, records: Sequence[dict[str, Any]]) -> tuple[Columns, list[bytes]]:
        """The good ones of `records`; their packed segmentations if masks are wanted.

        id [n] int64, unique numbers below -2^62 where a record has none; owner [n] int32, the position of the image;
        the others as in `Table`.
        """
        ids, repeated = self._ids(records)
        owner, category = self._owners(records, repeated)
        rows = ((owner >= 0) & (category >= 0) & ~repeated).nonzero()[0]
        kept = [records[i] for i in rows]
        ids, owner, category = ids[rows], owner[rows], category[rows]

        def where(i: int) -> str:
            return f"{self._name(kept[i], rows[i])} of image {kept[i]['image_id']}"

        boxes = _boxes(kept)
        extent = self._sizes[owner, ::-1]
        good = check_boxes(boxes, extent, self._report, lambda i: f"{where(i)}: bbox {kept[i].get('bbox')}")
        boxes[:, 2:] += boxes[:, :2]
        packed = self._pack(kept, owner, boxes, good, where) if self._masks else []
        self._done += len(records)
        area = _numbers([r.get("area") for r in kept])
        columns = {
            "id": ids,
            "owner": owner.astype(np.int32),
            "boxes": boxes,
            "categories": category.astype(np.int32),
            # COCO's own default: an object is no crowd, and covers its box.
            "crowd": np.array([bool(r.get("iscrowd")) for r in kept], bool),
            "ignore": np.array([bool(r.get("ignore")) for r in kept], bool),
            "areas": np.where(np.isnan(area), np.prod(boxes[:, 2:] - boxes[:, :2], 1), area),
        }
        return {name: column[good] for name, column in columns.items()}, packed

    def _name(self, record: dict[str, Any], position: int) -> str:
        return record.get("where") or f"annotation {record.get('id', f'number {self._done + position}')}"

    def _ids(self, records: Sequence[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
        """The column `id`; [n] bool, which ids that are no integers repeat. Integers are compared later, among all."""
        ids, repeated = _integers(records, "id"), np.zeros(len(records), bool)
        for i in (ids == _NO_INTEGER).nonzero()[0]:
            ids[i] = -(2**62) - self._done - i
            if (key := records[i].get("id")) is not None:
                repeated[i] = repr(key) in self._odd_ids
                self._odd_ids.add(repr(key))
        self._report.add_all("duplicate annotation id", repeated, lambda i: self._name(records[i], i))
        return ids, repeated

    def _owners(self, records: Sequence[dict[str, Any]], repeated: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions of the image and of the category of each record, negative where there is none."""
        owner = self._images.find(_integers(records, "image_id"))
        category = self._categories.find(_integers(records, "category_id"))
        lost = (owner == _UNKNOWN) & ~repeated
        if self._broken:
            lost &= np.array([repr(r.get("image_id")) not in self._broken for r in records], bool)

        def named(key: str, word: str) -> Callable[[int], str]:
            return lambda i: f"{self._name(records[i], i)} ({word} {records[i].get(key)})"

        self._report.add_all("annotation of an unknown image", lost, named("image_id", "image"))
        strange = (category == _UNKNOWN) & ~lost & ~repeated
        self._report.add_all("unknown category id", strange, named("category_id", "category"))
        return owner, category

    def _pack(
        self,
        records: Sequence[dict[str, Any]],
        owner: np.ndarray,
        boxes: np.ndarray,
        good: np.ndarray,
        where: Callable[[int], str],
    ) -> list[bytes]:
        """Of the objects that are good; not of those without a usable mask, where it clears `good`."""
        kept, sizes = [], []
        for i in good.nonzero()[0].tolist():
            segmentation, (height, width) = records[i].get("segmentation"), self._sizes[owner[i]].tolist()
            if wrong := segmentations.fault(segmentation, (height, width)):
                if not records[i].get("iscrowd"):
                    self._report.add("object without a usable mask", f"{where(i)}: {wrong}")
                    good[i] = False
                    continue
                x0, y0, x1, y1 = boxes[i].tolist()  # a crowd without one covers its box
                segmentation = [[x0, y0, x1, y0, x1, y1, x0, y1]]
            kept.append(segmentation)
            sizes.append((height, width))
        return segmentations.pack(kept, sizes)


class _Places:
    """Finds the positions of ids."""

    def __init__(self, ids: np.ndarray) -> None:
        self._order = np.argsort(ids, kind="stable")
        self._sorted = ids[self._order]

    def find(self, ids: np.ndarray) -> np.ndarray:
        if not len(self._order):
            return np.full(len(ids), _UNKNOWN)
        place = np.searchsorted(self._sorted, ids).clip(max=len(self._sorted) - 1)
        return np.where(self._sorted[place] == ids, self._order[place], _UNKNOWN)


def _integers(records: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    """[n] int64 of what the records hold under `key`, `_NO_INTEGER` where that is none."""
    values = [r.get(key) for r in records]
    try:
        column = np.array(values)
    except ValueError:  # lists of different lengths
        column = np.empty(0)
    if column.shape == (len(values),) and column.dtype.kind == "i":
        return column.astype(np.int64)
    fits = (type(v) is int and abs(v) < 2**62 for v in values)
    return np.array([v if fit else _NO_INTEGER for v, fit in zip(values, fits, strict=True)], np.int64)


def _boxes(records: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """[n, 4] of `bbox`, NaN where that is not four numbers."""
    values = [r.get("bbox") for r in records]
    try:
        boxes = np.array(values, np.float64)
    except (TypeError, ValueError):
        boxes = np.empty(0)
    if boxes.shape == (len(values), 4):
        return boxes
    return np.array([_four(v) for v in values], np.float64).reshape(-1, 4)


def _four(value: Any) -> tuple[float, ...]:
    try:
        x, y, w, h = map(float, value)
    except (TypeError, ValueError, OverflowError):
        return (np.nan,) * 4
    return x, y, w, h


def _numbers(values: Sequence[Any]) -> np.ndarray:
    """[n] float64, NaN where a value is no number."""
    try:
        return np.array(values, np.float64).reshape(len(values))
    except (TypeError, ValueError, OverflowError):
        return np.array([v if type(v) in (int, float) else np.nan for v in values], np.float64)
