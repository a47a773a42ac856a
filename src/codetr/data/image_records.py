"""The image records of a document as columns, checked."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from codetr.data.findings import Findings
from codetr.data.judge import WRITTEN, Record, repeated
from codetr.data.values import mended_image

_HIGHEST = 2**62  # of an id


class JudgedImage(NamedTuple):
    """An image record with values as they are meant.

    changes: the values that are written otherwise.
    was: how, in words.
    fault: why the image cannot be used, or "".
    """

    record: Record
    changes: Record
    was: str
    fault: str


def judge_images(records: Iterable[Record]) -> Iterator[JudgedImage]:
    """The records in their order."""
    for written in records:
        changes = mended_image(written)
        record = written | changes if changes else written
        yield JudgedImage(record, changes, ", ".join(f"{key} {written[key]!r}" for key in changes), _fault(record))


def _fault(record: Record) -> str:
    for key in ("id", "width", "height"):
        value = record.get(key)
        if type(value) is not int:
            return f"{key} is {value!r}, not a whole number" if key in record else f"has no {key}"
        if not (-_HIGHEST < value < _HIGHEST if key == "id" else 0 < value < 2**31):
            return f"{key} is {value}"
    name = record.get("file_name")
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        return f"file_name is {name!r}" if "file_name" in record else "has no file_name"
    return ""


def image_columns(
    records: Iterable[Record], categories: np.ndarray, findings: Findings
) -> tuple[dict[str, np.ndarray], set[str]]:
    """The columns of a `Table` that tell of images, in the order of `records`.

    categories: ids of all categories. Second: `repr` of the ids of images that cannot be used.
    """
    ids, sizes, names, ends, broken = array("q"), array("i"), bytearray(), array("q", [0]), set()
    folders: dict[str, None] = {}
    lists = {key: _Lists(categories) for key in ("neg_category_ids", "not_exhaustive_category_ids")}
    for position, (record, changes, was, fault) in enumerate(judge_images(records)):
        name = f"image {record.get('id', f'number {position}')}"
        if changes:
            findings.add(WRITTEN, f"{name}: {was}")
        if fault:
            findings.add("bad image record", record.get("where") or f"{name}: {fault}")
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
    return _without_repeated_images(columns, findings), broken


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


def _without_repeated_images(columns: dict[str, np.ndarray], findings: Findings) -> dict[str, np.ndarray]:
    """An id's first image stays."""
    ids, ends = columns["image_ids"], columns["name_offsets"]
    again = repeated(ids)
    if not again.any():
        return columns

    def name(i: int) -> str:
        return f"image {ids[i]} ({os.fsdecode(columns['names'][ends[i] : ends[i + 1] - 1].tobytes())})"

    findings.add_all("duplicate image id", again, name)
    kept = (~again).nonzero()[0]
    result = {"image_ids": ids[kept], "sizes": columns["sizes"][kept], "folders": columns["folders"]}
    for lists in ("names", "negative", "not_exhaustive"):
        offsets = "name_offsets" if lists == "names" else f"{lists}_offsets"
        result[lists], result[offsets] = columns[lists], columns[offsets]
        if len(columns[offsets]):
            result[lists], result[offsets] = take_lists(columns[lists], columns[offsets], kept)
    return result


def take_lists(values: np.ndarray, offsets: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Take from the lists values[offsets[i] : offsets[i + 1]] those of `rows`, in the same form."""
    lengths = np.diff(offsets)[rows]
    ends = np.concatenate([[0], np.cumsum(lengths)])
    return values[np.repeat(offsets[rows] - ends[:-1], lengths) + np.arange(ends[-1])], ends
