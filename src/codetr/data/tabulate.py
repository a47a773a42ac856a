"""A reader's document to the columns of a table, every record checked on the way.

Memory stays bounded: records come in batches, and what is kept of them goes to files at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from codetr.data import segmentations
from codetr.data.checks import root_category, select_classes
from codetr.data.findings import Findings
from codetr.data.image_records import image_columns
from codetr.data.judge import REPEATED, Judge, Judged, repeated
from codetr.data.readers import Document
from codetr.data.values import flag

_BATCH = 1 << 13  # larger ones are slower: their records leave the caches of the processor
_COLUMNS: dict[str, tuple[type, tuple[int, ...]]] = {
    "id": (np.int64, ()),
    "owner": (np.int32, ()),
    "boxes": (np.float64, (4,)),
    "categories": (np.int32, ()),
    "crowd": (np.bool_, ()),
    "ignore": (np.bool_, ()),
    "areas": (np.float64, ()),
    "segmentations": (np.uint8, ()),
    "lengths": (np.int64, ()),
}


class Tabulated(NamedTuple):
    """What `codetr.data.table.write` takes."""

    columns: dict[str, np.ndarray]
    category_names: list[str]
    frequencies: list[str] | None


def tabulate(document: Document, folder: Path, masks: bool, findings: Findings) -> Tabulated:
    """The usable records of `document`; what is wrong with the others goes into `findings`.

    folder: for temporary files, to which the columns are mapped.
    masks: keep segmentations, and only objects that have a usable one; crowds need none.

    Raises UserError where the categories make no sense.
    """
    categories = list(document["categories"])
    root = root_category(categories)
    select_classes([c for i, c in enumerate(categories) if i != root], None, findings.source)
    ids, names = np.array([c["id"] for c in categories], np.int64), [c["name"] for c in categories]
    columns, broken = image_columns(document["images"], ids, findings)
    judge = Judge(columns["image_ids"], columns["sizes"], broken, ids)
    read, sorted_ = _Files(folder / "read"), _Files(folder / "sorted")
    for records in _batches(document["annotations"]):
        judged = judge.judge(records)
        judged.tell(findings)
        read.append(_good_objects(judged, masks, findings))
    for rule, why in judge.habits.found(names).items():
        findings.add(rule, why)
    chosen = np.ones(len(ids), bool)
    if root is not None and not judge.habits.objects[root]:
        chosen[root] = False
        findings.add("root of the categories", f"category {ids[root]} ({names[root]})")
    classes = select_classes([c for c, stays in zip(categories, chosen, strict=True) if stays], None, findings.source)
    rows, columns["offsets"] = _by_image(read, columns["image_ids"], findings)
    _copy(read, sorted_, rows, masks)
    columns |= {"category_ids": ids[chosen]} | {
        name: sorted_.column(name) for name in ("boxes", "categories", "crowd", "ignore", "areas", "segmentations")
    }
    columns["segmentation_offsets"] = _ends(sorted_.column("lengths")) if masks else np.empty(0, np.int64)
    if not chosen.all():
        columns["categories"] = (np.cumsum(chosen, dtype=np.int32) - 1)[columns["categories"]]
    columns["counts"], columns["image_counts"] = count(columns, len(classes))
    letters = [str(c.get("frequency")) for c in categories]
    return Tabulated(columns, list(classes.values()), letters if letters and {*letters} <= {"r", "c", "f"} else None)


def _batches(records: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    iterator = iter(records)
    while batch := list(islice(iterator, _BATCH)):
        yield batch


def _good_objects(judged: Judged, masks: bool, findings: Findings) -> dict[str, np.ndarray]:
    """The columns `_COLUMNS` of the good ones; an area that is not known is that of the box."""
    rows = judged.good.nonzero()[0]
    packed: list[bytes] = []
    if masks:
        rows, packed = _pack(judged, rows, findings)
    boxes = judged.boxes[rows]
    boxes[:, 2:] += boxes[:, :2]
    areas = judged.areas[rows]
    return {
        "id": judged.ids[rows],
        "owner": judged.owner[rows],
        "boxes": boxes,
        "categories": judged.category[rows],
        "crowd": judged.crowd[rows],
        "ignore": judged.ignore[rows],
        "areas": np.where(np.isnan(areas), np.prod(boxes[:, 2:] - boxes[:, :2], 1), areas),
    } | _joined(packed, masks)


def _pack(judged: Judged, rows: np.ndarray, findings: Findings) -> tuple[np.ndarray, list[bytes]]:
    """The rows of `rows` that have a usable mask, and their masks; a crowd without one covers its box."""
    kept, masks, sizes = [], [], []
    for i in rows.tolist():
        record = judged.records[i]
        width, height = map(int, judged.extent[i])
        segmentation = record.get("segmentation")
        if wrong := segmentations.fault(segmentation, (height, width)):
            if not flag(record.get("iscrowd")):
                what = f"{judged.name(i)} of image {record['image_id']}: {wrong}"
                findings.add("object without a usable mask", what)
                continue
            x0, y0, w, h = judged.boxes[i].tolist()
            x1, y1 = x0 + w, y0 + h
            segmentation = [[x0, y0, x1, y0, x1, y1, x0, y1]]
        kept.append(i)
        masks.append(segmentation)
        sizes.append((height, width))
    return np.array(kept, np.int64), segmentations.pack(masks, sizes)


def _joined(packed: Sequence[bytes], masks: bool) -> dict[str, np.ndarray]:
    if not masks:
        return {}
    return {
        "segmentations": np.frombuffer(b"".join(packed), np.uint8),
        "lengths": np.array([len(p) for p in packed], np.int64),
    }


class _Files:
    """Growing columns, each in a file of its own."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder = folder

    def append(self, columns: dict[str, np.ndarray]) -> None:
        for name, column in columns.items():
            with (self._folder / name).open("ab") as file:
                np.ascontiguousarray(column, _COLUMNS[name][0]).tofile(file)

    def column(self, name: str) -> np.ndarray:
        path, (dtype, shape) = self._folder / name, _COLUMNS[name]
        if not path.exists() or not path.stat().st_size:
            return np.empty((0, *shape), dtype)
        return np.asarray(np.memmap(path, dtype, "r")).reshape(-1, *shape)


def _by_image(read: _Files, images: np.ndarray, findings: Findings) -> tuple[np.ndarray, np.ndarray]:
    """The objects that stay, sorted by image, and where each image's begin; an id's first object stays."""
    ids, owner = read.column("id"), read.column("owner")
    again = repeated(ids)
    findings.add_all(REPEATED, again, lambda i: f"annotation {ids[i]} of image {images[owner[i]]}")
    rows = (~again).nonzero()[0]
    if not np.all(owner[1:] >= owner[:-1]):
        rows = rows[np.argsort(owner[rows], kind="stable")]
    return rows, _ends(np.bincount(owner[rows], minlength=len(images)))


def _ends(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def _copy(read: _Files, to: _Files, rows: np.ndarray, masks: bool) -> None:
    """The rows of every column, in their order."""
    for name in ("boxes", "categories", "crowd", "ignore", "areas"):
        column = read.column(name)
        for i in range(0, len(rows), _BATCH):
            to.append({name: column[rows[i : i + _BATCH]]})
    if masks:
        packed, ends = read.column("segmentations"), _ends(read.column("lengths"))
        for i in range(0, len(rows), _BATCH):
            spans = zip(ends[rows[i : i + _BATCH]].tolist(), ends[rows[i : i + _BATCH] + 1].tolist(), strict=True)
            to.append(_joined([packed[start:end].tobytes() for start, end in spans], masks))


def count(columns: dict[str, np.ndarray], categories: int) -> tuple[np.ndarray, np.ndarray]:
    """Per category, the objects that are neither crowd nor ignored, and the images with such an object."""
    objects, images = np.zeros(categories, np.int64), np.zeros(categories, np.int64)
    bounds = np.unique(np.r_[0 : len(columns["offsets"]) : _BATCH, len(columns["offsets"]) - 1])
    for first, last in pairwise(bounds):
        ends = columns["offsets"][first : last + 1]
        rows = slice(ends[0], ends[-1])
        usable = ~(columns["crowd"][rows] | columns["ignore"][rows])
        labels = columns["categories"][rows][usable]
        owner = np.repeat(np.arange(last - first), np.diff(ends))[usable]
        objects += np.bincount(labels, minlength=categories)
        images += np.bincount(np.unique(owner * categories + labels) % max(categories, 1), minlength=categories)
    return objects, images
