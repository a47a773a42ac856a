"""The judge of annotation records: what they mean, as columns, and which rules of `codetr.data.rules` each breaks.

Training and conversion leave out what breaks an error; the check of a data set tells of every rule.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from codetr.data.findings import Findings
from codetr.data.rules import BOX_RULES, RULES, Habits, box_rules, clip
from codetr.data.values import flag, mended_object, number

Record = dict[str, Any]
Columns = dict[str, np.ndarray]
WRITTEN, REPEATED = "value of another type", "duplicate annotation id"
_IMAGE, _CATEGORY = "annotation of an unknown image", "unknown category id"
_FLAG, _AREA = "flag that is not 0 or 1", "area that is not a number above 0"
_FLAGS = ("iscrowd", "ignore")
_NO_INTEGER, _UNKNOWN = -(2**63), -1
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


@dataclass
class Judged:
    """n records as columns, with what is wrong with them.

    records: with values as they are meant.
    written: as they are in the file.
    changes: position -> the values that differ.
    first: the number of the first of them in the file.
    ids: [n] int64, unique numbers below -2^62 where a record has none.
    owner, category: [n] positions of the image and of the category, negative where there is none.
    boxes: [n, 4] xywh in pixels.
    extent: [n, 2] (width, height) of their images, NaN where unknown.
    crowd, ignore: [n] bool.
    areas: [n], NaN where a record has none above 0.
    broken: rule -> [n] bool, in the order of the table.
    """

    records: Sequence[Record]
    written: Sequence[Record]
    changes: dict[int, Record]
    first: int
    ids: np.ndarray
    owner: np.ndarray
    category: np.ndarray
    boxes: np.ndarray
    extent: np.ndarray
    crowd: np.ndarray
    ignore: np.ndarray
    areas: np.ndarray
    broken: dict[str, np.ndarray]

    @property
    def good(self) -> np.ndarray:
        """[n] bool, which records break no error and have a usable image."""
        good = self.owner >= 0
        for rule, hits in self.broken.items():
            if RULES[rule].severity == "error":
                good = good & ~hits
        return good

    def name(self, i: int) -> str:
        """Record i by its id, or by the place that its reader knows."""
        record = self.written[i]
        return str(record.get("where") or f"annotation {record.get('id', f'number {self.first + i}')}")

    def why(self, rule: str, i: int) -> str:
        """What of record i breaks the rule, as the end of a sentence."""
        record, written = self.records[i], self.written[i]
        if rule == WRITTEN:
            return ": " + ", ".join(f"{key} {written[key]!r}" for key in self.changes[i])
        if rule in (_IMAGE, _CATEGORY):
            word = "image" if rule == _IMAGE else "category"
            return f" ({word} {record.get(f'{word}_id')!r})"
        if rule == _FLAG:
            return ": " + ", ".join(f"{k} {record[k]!r}" for k in _FLAGS if flag(record.get(k)) is None)
        if rule.startswith("area"):
            return f": area {record['area']!r}, box {np.prod(self.boxes[i, 2:]):.6g}"
        if rule == BOX_RULES[0]:
            return f": bbox {record.get('bbox')!r}"
        if rule in BOX_RULES:
            width, height = self.extent[i]
            return f": bbox [{', '.join(f'{v:.6g}' for v in self.boxes[i])}] in {width:.0f}x{height:.0f}"
        return f": id {record.get('id')!r}" if rule == "annotation without id" else ""

    def mended(self, rule: str, i: int) -> Record:
        """The values of record i that keep it from breaking a rule which is no error."""
        if rule == WRITTEN:
            return self.changes[i]
        if rule == _AREA:
            return {"area": float(np.prod(self.boxes[i, 2:]))}
        return {"bbox": clip(self.boxes[i : i + 1], self.extent[i : i + 1])[0].tolist()}

    def tell(self, findings: Findings) -> None:
        """Count what training and conversion leave out, each record under the first error that it breaks, and what
        they read otherwise than it is written."""
        good, told = self.good, (self.owner < 0) & ~self.broken[_IMAGE]
        for rule, hits in self.broken.items():
            if RULES[rule].severity == "error":
                findings.add_all(rule, hits & ~told, partial(self._named, rule))
                told |= hits
            elif RULES[rule].mend:
                findings.add_all(rule, hits & good, partial(self._named, rule))

    def _named(self, rule: str, i: int) -> str:
        image = "" if rule in (_IMAGE, _CATEGORY) else f" of image {self.records[i].get('image_id')}"
        return f"{self.name(i)}{image}{self.why(rule, i)}"


class Judge:
    """Judges annotation records, batch after batch.

    image_ids: [k] of the images that can be used, and sizes: [k, 2] (height, width) of these.
    broken: `repr` of the ids of the other images, whose objects are left out without a word.
    categories: ids of all categories.
    """

    def __init__(self, image_ids: np.ndarray, sizes: np.ndarray, broken: set[str], categories: np.ndarray) -> None:
        self._images, self._categories = _Places(image_ids), _Places(categories)
        self._sizes, self._broken = sizes, broken
        self.habits = Habits(len(categories))
        self._done = 0
        self._odd_ids: set[str] = set()

    def judge(self, written: Sequence[Record]) -> Judged:
        """The next records. Integers as ids are not compared: the caller knows when all are together."""
        raw, changes, records = _read(written)
        owner, category = self._images.find(raw["image_id"]), self._categories.find(raw["category_id"])
        boxes = raw["bbox"].astype(np.float64)
        extent = np.full((len(records), 2), np.nan)
        extent[owner >= 0] = self._sizes[owner[owner >= 0], ::-1]
        areas = np.where(np.isfinite(raw["area"]) & (raw["area"] > 0), raw["area"], np.nan)
        ids, repeated = self._ids(records)
        placed = (owner >= 0) & (category >= 0) & ~repeated
        crowd = raw["iscrowd"] == 1
        self.habits.count(boxes[placed], extent[placed], category[placed], crowd[placed])
        no_area = np.isnan(areas)
        no_area[no_area] = ["area" in records[i] for i in no_area.nonzero()[0].tolist()]
        lost = owner == _UNKNOWN
        lost[lost] = [repr(records[i].get("image_id")) not in self._broken for i in lost.nonzero()[0].tolist()]
        unnamed = ids < -(2**62)
        unnamed[unnamed] = ["where" not in records[i] for i in unnamed.nonzero()[0].tolist()]
        changed = np.zeros(len(records), bool)
        changed[list(changes)] = True
        kinds = box_rules(boxes, extent)
        kinds[(owner < 0) & (kinds > 0)] = -1
        with np.errstate(over="ignore", invalid="ignore"):
            box_area = np.prod(boxes[:, 2:], 1)
            large = (areas > 1.05 * box_area + 1) & (box_area > 0)
        broken = {
            "annotation without id": unnamed,
            REPEATED: repeated,
            _IMAGE: lost,
            _CATEGORY: category == _UNKNOWN,
            WRITTEN: changed,
            _FLAG: ~(np.isin(raw["iscrowd"], (0, 1)) & np.isin(raw["ignore"], (0, 1))),
            _AREA: no_area,
            "area larger than the box": large,
            **{rule: kinds == i for i, rule in enumerate(BOX_RULES)},
        }
        first, self._done = self._done, self._done + len(records)
        ignore = raw["ignore"] == 1
        columns = (ids, owner, category, boxes, extent, crowd, ignore, areas)
        return Judged(records, written, changes, first, *columns, broken)

    def judge_all(self, written: Sequence[Record]) -> Judged:
        """Judge all records of a file, also whether a good one has an id that appeared before."""
        judged = self.judge(written)
        rows = judged.good.nonzero()[0]
        judged.broken[REPEATED][rows] = repeated(judged.ids[rows])
        return judged

    def _ids(self, records: Sequence[Record]) -> tuple[np.ndarray, np.ndarray]:
        """The column `id`; [n] bool, which ids that are no integers appeared before."""
        ids, again = _integers(records, "id"), np.zeros(len(records), bool)
        for i in (ids == _NO_INTEGER).nonzero()[0]:
            ids[i] = -(2**62) - 1 - self._done - i
            if (key := records[i].get("id")) is not None:
                again[i] = repr(key) in self._odd_ids
                self._odd_ids.add(repr(key))
        return ids, again


def repeated(ids: np.ndarray) -> np.ndarray:
    """[n] bool, which of `ids` [n] appeared before."""
    again = np.zeros(len(ids), bool)
    if not np.all(ids[1:] > ids[:-1]):
        order = np.argsort(ids, kind="stable")
        again[order[1:][ids[order[1:]] == ids[order[:-1]]]] = True
    return again


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


def _read(written: Sequence[Record]) -> tuple[Columns, dict[int, Record], Sequence[Record]]:
    """Numbers of the records as they are written; where some are not, what they mean, the values that differ, and the
    records with these."""
    columns = {key: _plain([r.get(key, default) for r in written], *form) for key, default, form in _FORMS}
    if all(column is not None for column in columns.values()):
        return columns, {}, written  # type: ignore[return-value]
    changes = {i: change for i, r in enumerate(written) if (change := mended_object(r))}
    meant = [r | changes[i] if i in changes else r for i, r in enumerate(written)]
    columns = {key: _integers(meant, key) for key in ("image_id", "category_id")}
    columns["bbox"] = np.array([_four(r.get("bbox")) for r in meant], np.float64).reshape(-1, 4)
    columns |= {key: _numbers([flag(r.get(key)) for r in meant]) for key in _FLAGS}
    columns["area"] = _numbers([number(r.get("area")) for r in meant])
    return columns, changes, meant  # type: ignore[return-value]


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
