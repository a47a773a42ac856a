"""The annotation records of a document as columns, checked batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from codetr.data import segmentations
from codetr.data.checks import Report, check_boxes
from codetr.data.rules import Habits
from codetr.data.values import flag, mended_object, number

Columns = dict[str, np.ndarray]
_NO_INTEGER = -(2**63)
_UNKNOWN = -1
# Key of a record, what it is where left out, and how numpy sees a column of proper ones. COCO's own default: an object
# is no crowd, and covers its box.
_FORMS: tuple[tuple[str, Any, tuple[Any, ...]], ...] = (
    ("image_id", None, ("i",)),
    ("category_id", None, ("i",)),
    ("bbox", None, ("if", 4)),
    ("iscrowd", 0, ("ib",)),
    ("ignore", 0, ("ib",)),
    ("area", np.nan, ("if",)),
)


class Batch(NamedTuple):
    """The good ones of some records.

    columns: id [n] int64, unique numbers below -2^62 where a record has none; owner [n] int32, the position of the
    image; the others as in `Table`. packed: their segmentations if masks are wanted. positions: [n] among all records
    so far.
    """

    columns: Columns
    packed: list[bytes]
    positions: np.ndarray


class ObjectRecords:
    """Turns batches of annotations into columns; what is wrong with the others goes into `report`.

    images: columns of the images; broken: `repr` of the ids of images that cannot be used, whose objects are left out
    without a word. categories: ids of all categories. masks: keep segmentations, and only objects with a usable one.
    """

    def __init__(self, images: Columns, broken: set[str], categories: np.ndarray, masks: bool, report: Report) -> None:
        self._images, self._categories = _Places(images["image_ids"]), _Places(categories)
        self._sizes, self._broken, self._masks, self._report = images["sizes"], broken, masks, report
        self.habits = Habits(len(categories))
        self._done = 0
        self._odd_ids: set[str] = set()

    def columns(self, records: Sequence[dict[str, Any]]) -> Batch:
        """What is good of the next `records`."""
        raw, records = self._read(records)
        ids, repeated = self._ids(records)
        owner, category = self._owners(records, raw, repeated)
        rows = ((owner >= 0) & (category >= 0) & ~repeated).nonzero()[0]
        kept, owner, category = [records[i] for i in rows], owner[rows], category[rows]

        def where(i: int) -> str:
            return f"{self._name(kept[i], rows[i])} of image {kept[i]['image_id']}"

        boxes, extent = raw["bbox"][rows].astype(np.float64), self._sizes[owner, ::-1]
        self.habits.count(boxes, extent, category, raw["iscrowd"][rows] == 1)
        good = check_boxes(boxes, extent, self._report, lambda i: f"{where(i)}: bbox {kept[i].get('bbox')}")
        for key in ("iscrowd", "ignore"):
            strange = good & ~np.isin(raw[key][rows], (0, 1))
            self._report.add_all("flag that is not 0 or 1", strange, lambda i: f"{where(i)}: {key} {kept[i][key]!r}")  # noqa: B023
            good &= ~strange
        boxes[:, 2:] += boxes[:, :2]
        packed = self._pack(kept, owner, boxes, good, where) if self._masks else []
        columns = {
            "id": ids[rows],
            "owner": owner.astype(np.int32),
            "boxes": boxes,
            "categories": category.astype(np.int32),
            "crowd": raw["iscrowd"][rows] == 1,
            "ignore": raw["ignore"][rows] == 1,
            "areas": self._areas(kept, raw["area"][rows], boxes, good, where),
        }
        first, self._done = self._done, self._done + len(records)
        return Batch({name: column[good] for name, column in columns.items()}, packed, first + rows[good])

    def _read(self, records: Sequence[dict[str, Any]]) -> tuple[Columns, Sequence[dict[str, Any]]]:
        """Numbers of the records as they are written; where some are not, what they mean, and the records with it."""
        columns = {key: _plain([r.get(key, default) for r in records], *form) for key, default, form in _FORMS}
        if all(column is not None for column in columns.values()):
            return columns, records  # type: ignore[return-value]
        changes = [mended_object(r) for r in records]
        written = np.array([bool(c) for c in changes], bool)

        def name(i: int) -> str:
            was = ", ".join(f"{key} {records[i][key]!r}" for key in changes[i])
            return f"{self._name(records[i], i)}: {was}"

        self._report.add_all("value of another type", written, name)
        meant = [r | c if c else r for r, c in zip(records, changes, strict=True)]
        return {
            "image_id": _integers(meant, "image_id"),
            "category_id": _integers(meant, "category_id"),
            "bbox": np.array([_four(r.get("bbox")) for r in meant], np.float64).reshape(-1, 4),
            "iscrowd": _numbers([flag(r.get("iscrowd")) for r in meant]),
            "ignore": _numbers([flag(r.get("ignore")) for r in meant]),
            "area": _numbers([number(r.get("area")) for r in meant]),
        }, meant

    def _areas(
        self,
        records: Sequence[dict[str, Any]],
        areas: np.ndarray,
        boxes: np.ndarray,
        good: np.ndarray,
        where: Callable[[int], str],
    ) -> np.ndarray:
        """Those of the boxes where a record has none above 0."""
        wrong = ~(np.isfinite(areas) & (areas > 0))
        if not wrong.any():
            return areas
        told = wrong & good
        told[told] = ["area" in records[i] for i in told.nonzero()[0]]
        self._report.add_all(
            "area that is not a number above 0", told, lambda i: f"{where(i)}: area {records[i]['area']!r}"
        )
        return np.where(wrong, np.prod(boxes[:, 2:] - boxes[:, :2], 1), areas)

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

    def _owners(
        self, records: Sequence[dict[str, Any]], raw: Columns, repeated: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Positions of the image and of the category of each record, negative where there is none."""
        owner, category = self._images.find(raw["image_id"]), self._categories.find(raw["category_id"])
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
                if not flag(records[i].get("iscrowd")):
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


def _plain(values: Sequence[Any], kinds: str, *shape: int) -> np.ndarray | None:
    """[n, *shape] of values that are all numbers of these kinds of numpy; None if one is not."""
    try:
        column = np.array(values)
    except ValueError:  # lists of different lengths
        return None
    return column if column.dtype.kind in kinds and column.shape == (len(values), *shape) else None


def _four(value: Any) -> tuple[float, ...]:
    if not isinstance(value, (list, tuple)) or len(value) != 4 or any(type(v) not in (int, float) for v in value):
        return (np.nan,) * 4
    return tuple(map(float, value))


def _numbers(values: Sequence[float | None]) -> np.ndarray:
    """[n] float64, NaN for None."""
    return np.array([np.nan if v is None else v for v in values], np.float64)
