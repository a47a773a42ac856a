"""The image records of a document as columns, checked."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from codetr.data.checks import Report
from codetr.data.values import mended_image


def image_columns(
    records: Iterable[dict[str, Any]], categories: np.ndarray, report: Report
) -> tuple[dict[str, np.ndarray], set[Any]]:
    """The columns of a `Table` that tell of images, in the order of `records`.

    categories: ids of all categories. Second: `repr` of the ids of images that cannot be used.
    """
    ids, sizes, names, ends, broken = array("q"), array("i"), bytearray(), array("q", [0]), set()
    folders: dict[str, None] = {}
    lists = {key: _Lists(categories) for key in ("neg_category_ids", "not_exhaustive_category_ids")}
    for position, written in enumerate(records):
        changes = mended_image(written)
        record = written | changes
        if changes:
            was = ", ".join(f"{key} {written[key]!r}" for key in changes)
            report.add("value of another type", f"image {record.get('id', f'number {position}')}: {was}")
        if not _is_image(record):
            report.add("bad image record", record.get("where") or f"image {record.get('id', f'number {position}')}")
            broken.add(repr(record.get("id")))
            continue
        ids.append(record["id"])
        sizes.extend((record["height"], record["width"]))
        names += os.fsencode(record["file_name"]) + b"\0"
        ends.append(len(names))
        folders[record["file_name"].rpartition("/")[0]] = None
        for key, column in lists.items():
            column.append(record.get(key))
    columns: dict[str, np.ndarray] = {
        "image_ids": np.array(ids, np.int64),
        "sizes": np.array(sizes, np.int32).reshape(-1, 2),
        "names": np.frombuffer(bytes(names), np.uint8),
        "name_offsets": np.array(ends, np.int64),
        "folders": np.frombuffer(b"".join(os.fsencode(f) + b"\0" for f in folders), np.uint8),
    }
    for name, column in zip(("negative", "not_exhaustive"), lists.values(), strict=True):
        columns[name], columns[f"{name}_offsets"] = column.arrays()
    return _without_repeated_images(columns, report), broken


def _is_image(record: Mapping[str, Any]) -> bool:
    numbers = [record.get(k) for k in ("id", "width", "height")]
    if not all(type(n) is int and abs(n) < 2**62 for n in numbers):
        return False
    name = record.get("file_name")
    fits = 0 < min(record["width"], record["height"]) <= max(record["width"], record["height"]) < 2**31
    return fits and isinstance(name, str) and "\0" not in name


class _Lists:
    """A column of lists of categories, one per image, if any image has one."""

    def __init__(self, categories: np.ndarray) -> None:
        self._position = {int(c): i for i, c in enumerate(categories)}
        self._values, self._ends, self._any = array("i"), array("q", [0]), False

    def append(self, ids: Any) -> None:
        if isinstance(ids, list):
            self._any = True
            self._values.extend(self._position[i] for i in ids if i in self._position)
        self._ends.append(len(self._values))

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        return np.array(self._values, np.int32), np.array(self._ends if self._any else [], np.int64)


def _without_repeated_images(columns: dict[str, np.ndarray], report: Report) -> dict[str, np.ndarray]:
    """An id's first image stays."""
    ids, ends = columns["image_ids"], columns["name_offsets"]
    repeated = np.ones(len(ids), bool)
    repeated[np.unique(ids, return_index=True)[1]] = False
    if not repeated.any():
        return columns

    def name(i: int) -> str:
        return f"image {ids[i]} ({os.fsdecode(columns['names'][ends[i] : ends[i + 1] - 1].tobytes())})"

    report.add_all("duplicate image id", repeated, name)
    kept = (~repeated).nonzero()[0]
    result = {"image_ids": ids[kept], "sizes": columns["sizes"][kept], "folders": columns["folders"]}
    for lists in ("names", "negative", "not_exhaustive"):
        offsets = "name_offsets" if lists == "names" else f"{lists}_offsets"
        result[lists], result[offsets] = columns[lists], columns[offsets]
        if len(columns[offsets]):
            result[lists], result[offsets] = take_lists(columns[lists], columns[offsets], kept)
    return result


def take_lists(values: np.ndarray, offsets: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of lists values[offsets[i] : offsets[i + 1]] those of `rows`, in the same form."""
    lengths = np.diff(offsets)[rows]
    ends = np.concatenate([[0], np.cumsum(lengths)])
    return values[np.repeat(offsets[rows] - ends[:-1], lengths) + np.arange(ends[-1])], ends
