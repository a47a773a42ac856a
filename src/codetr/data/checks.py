"""What can be wrong with a COCO data set, found before any training time is spent on it.

Structural faults (no file, no JSON, no categories) always stop. Bad records follow `on_error`: "stop" raises one
UserError that names the first few of every kind; "skip" drops them and logs one summary.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from codetr.data import segmentations
from codetr.data.images import UnreadableImage, looks_complete, read_image
from codetr.errors import UserError

OnError = Literal["stop", "skip"]
Verify = Literal["exists", "complete", "decode"]

_log = logging.getLogger(__name__)
_SHOWN = 3
_ADVICE = {
    "bad image record": "each image needs integer `id`, `width` and `height` above 0, and a `file_name`",
    "duplicate image id": "give each image its own id",
    "missing image file": "put the file there, or remove the image from the annotations",
    "unreadable image file": "restore the file from its source",
    "duplicate annotation id": "give each annotation its own id",
    "annotation of an unknown image": "add the image or remove the annotation",
    "unknown category id": "add the category or remove the annotation",
    "box that is not 4 finite numbers": "write bbox as [x, y, width, height] in pixels",
    "box without area": "bbox is [x, y, width, height]; width and height must be above 0",
    "box outside its image": "check the box, and the image's width and height",
    "object without a usable mask": "mend its `segmentation`, or train without masks: data.masks=false",
}


@dataclass
class Report:
    """Problems found in one annotation file. counts: kind -> number; examples: kind -> the first few records.

    clipped: number of boxes that reach out of their image and were clipped for training.
    """

    source: Path
    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    clipped: int = 0

    def add(self, kind: str, record: str) -> None:
        self.counts[kind] = self.counts.get(kind, 0) + 1
        shown = self.examples.setdefault(kind, [])
        if len(shown) < _SHOWN:
            shown.append(record)

    def __str__(self) -> str:
        lines = []
        for kind, count in self.counts.items():
            more = "" if count <= _SHOWN else ", ..."
            lines.append(f"  {count} x {kind}: {', '.join(self.examples[kind])}{more} ({_ADVICE[kind]})")
        if self.clipped:
            lines.append(f"  {self.clipped} x box partly outside its image: clipped for training")
        return "\n".join(lines)

    def settle(self, on_error: OnError) -> None:
        """Raise UserError on problems when `on_error` is "stop"; log what is dropped when it is "skip"."""
        total = sum(self.counts.values())
        if total and on_error == "stop":
            raise UserError(
                f"{self.source}: {total} bad record{'s' * (total > 1)}\n{self}\n"
                "Mend them, or set data.on_error=skip to train without them."
            )
        if total:
            _log.warning("%s: %d bad records dropped\n%s", self.source, total, self)
        elif self.clipped:
            _log.info("%s:\n%s", self.source, self)


def read_coco(path: Path) -> dict[str, Any]:
    """The document at `path`, with its three lists of records.

    Raises UserError when there is no such file, or it is not JSON, or not COCO.
    """
    try:
        with path.open("rb") as file:
            document = json.load(file)
    except FileNotFoundError as error:
        raise UserError(f"annotation file {path} does not exist: check the paths under `data`") from error
    except OSError as error:
        raise UserError(f"annotation file {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): give a COCO instances file") from error
    keys = ("images", "annotations", "categories")
    wrong = [k for k in keys if not isinstance(document, dict) or not _is_records(document.get(k))]
    if wrong:
        raise UserError(f"{path} is not a COCO instances file: no list of objects under {', '.join(wrong)}")
    return document


def _is_records(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, dict) for v in value)


def select_classes(
    categories: Sequence[Mapping[str, Any]], classes: Sequence[str] | None, source: Path
) -> dict[int, str]:
    """Category id -> name of the classes to train, in the order of their labels.

    `classes` selects and orders by name; None takes all in the order of the file. Raises UserError on malformed
    or repeated categories and on unknown or repeated class names.
    """
    ids: list[Any] = [c.get("id") for c in categories]
    names: list[Any] = [c.get("name") for c in categories]
    if not all(type(i) is int for i in ids) or not all(isinstance(n, str) for n in names):
        raise UserError(f"{source}: each category needs an integer `id` and a `name`")
    for key, values in (("id", ids), ("name", names)):
        if repeated := _repeated(values):
            raise UserError(f"{source}: category {key} {repeated} appears more than once: make it unique")
    if classes is None:
        return dict(zip(ids, names, strict=True))
    if unknown := [c for c in classes if c not in names]:
        raise UserError(f"data.classes names {unknown}, but {source} only has {names}")
    if repeated := _repeated(classes):
        raise UserError(f"data.classes names {repeated} more than once: name each class once")
    return {ids[names.index(c)]: c for c in classes}


def _repeated(values: Iterable[Any]) -> list[Any]:
    seen: set[Any] = set()
    return [v for v in values if v in seen or seen.add(v)]  # type: ignore[func-returns-value]


def check_images(records: list[dict[str, Any]], root: Path, verify: Verify, report: Report) -> list[dict]:
    """The usable ones of `records`, in their order.

    verify: "exists" asks for the file, "complete" also for a header and an end of file that fit (suspicious files
    are decoded), "decode" decodes every file. Raises UserError when `root` is not a folder.
    """
    if not root.is_dir():
        raise UserError(f"image folder {root} does not exist: check the paths under `data`")
    kept: dict[int, dict] = {}
    for position, record in enumerate(records):
        if not _is_image(record):
            report.add("bad image record", f"image {record.get('id', f'number {position}')}")
        elif record["id"] in kept:
            report.add("duplicate image id", f"image {record['id']} ({record['file_name']})")
        else:
            kept[record["id"]] = record
    present = _present(root, kept.values())
    for record in kept.values():
        if record["file_name"] not in present:
            report.add("missing image file", f"image {record['id']} ({root / record['file_name']})")
    found = [r for r in kept.values() if r["file_name"] in present]
    if verify == "exists":
        return found
    with ThreadPoolExecutor(16) as pool:
        faults = list(pool.map(lambda r: _fault(r, root, verify), found))
    for record, fault in zip(found, faults, strict=True):
        if fault:
            report.add("unreadable image file", f"image {record['id']} ({fault})")
    return [r for r, fault in zip(found, faults, strict=True) if not fault]


def _is_image(record: dict[str, Any]) -> bool:
    numbers = [record.get(k) for k in ("id", "width", "height")]
    fits = all(type(n) is int for n in numbers) and isinstance(record.get("file_name"), str)
    return fits and min(record["width"], record["height"]) > 0


def _present(root: Path, records: Iterable[dict[str, Any]]) -> set[str]:
    """The file names that exist; one listing per folder, which is much faster than asking file by file."""
    names = [r["file_name"] for r in records]
    folders = {os.path.dirname(n) for n in names}
    listed = {}
    for folder in folders:
        path = root / folder
        listed[folder] = {e.name for e in os.scandir(path)} if path.is_dir() else set()
    return {n for n in names if os.path.basename(n) in listed[os.path.dirname(n)]}


def _fault(record: dict[str, Any], root: Path, verify: Verify) -> str:
    path, size = root / record["file_name"], (record["height"], record["width"])
    if verify == "complete" and looks_complete(path, size):
        return ""
    try:
        read_image(path, size)
    except UnreadableImage as error:
        return str(error)
    return ""


def check_annotations(
    records: list[dict[str, Any]],
    known_images: set[int],
    sizes: Mapping[int, tuple[int, int]],
    categories: set[int],
    report: Report,
) -> tuple[list[dict[str, Any]], np.ndarray]:
    """The usable ones of `records` and their boxes, [n, 4] xyxy in pixels, as in the file (not clipped).

    known_images: all image ids of the file; sizes: image id -> (height, width) of the usable ones, since what
    belongs to a dropped image is dropped with it. categories: all category ids of the file.
    """
    kept, seen = [], set()
    for position, record in enumerate(records):
        key = record.get("id", f"number {position}")
        name = f"annotation {key}"
        if key in seen:
            report.add("duplicate annotation id", name)
        elif record.get("image_id") not in known_images:
            report.add("annotation of an unknown image", f"{name} (image {record.get('image_id')})")
        elif record.get("category_id") not in categories:
            report.add("unknown category id", f"{name} (category {record.get('category_id')})")
        elif record["image_id"] in sizes:
            kept.append(record)
        seen.add(key)
    boxes = np.array([_xywh(r) for r in kept], np.float64).reshape(-1, 4)
    extent = np.array([sizes[r["image_id"]] for r in kept], np.float64).reshape(-1, 2)[:, ::-1]
    good = _check_boxes(boxes, extent, kept, report)
    boxes[:, 2:] += boxes[:, :2]
    reach_out = (boxes[:, :2] < 0) | (boxes[:, 2:] > extent)
    report.clipped = int((reach_out.any(1) & good).sum())
    return [r for r, g in zip(kept, good, strict=True) if g], boxes[good]


def check_masks(
    records: list[dict[str, Any]], boxes: np.ndarray, sizes: Mapping[int, tuple[int, int]], report: Report
) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Those of `records`, with their `boxes`, whose segmentation can be decoded; crowds need none."""
    good = np.ones(len(records), bool)
    for i, record in enumerate(records):
        wrong = segmentations.fault(record.get("segmentation"), sizes[record["image_id"]])
        if wrong and not record.get("iscrowd", 0):
            where = f"annotation {record.get('id')} of image {record['image_id']}"
            report.add("object without a usable mask", f"{where}: {wrong}")
            good[i] = False
    return [r for r, g in zip(records, good, strict=True) if g], boxes[good]


def _xywh(record: dict[str, Any]) -> tuple[float, ...]:
    """Four numbers, NaN where the record does not hold them."""
    try:
        x, y, w, h = map(float, record["bbox"])
    except (KeyError, TypeError, ValueError):
        return (np.nan,) * 4
    return x, y, w, h


def _check_boxes(boxes: np.ndarray, extent: np.ndarray, records: list[dict[str, Any]], report: Report) -> np.ndarray:
    """[n] bool, which `boxes` (xywh) are good; extent: [n, 2] (width, height) of their images."""
    finite = np.isfinite(boxes).all(1)
    solid = (boxes[:, 2:] > 0).all(1)
    inside = ((boxes[:, :2] < extent) & (boxes[:, :2] + boxes[:, 2:] > 0)).all(1)
    faults = {
        "box that is not 4 finite numbers": ~finite,
        "box without area": finite & ~solid,
        "box outside its image": finite & solid & ~inside,
    }
    for kind, bad in faults.items():
        for i in bad.nonzero()[0]:
            record = records[i]
            where = f"annotation {record.get('id')} of image {record['image_id']}"
            report.add(kind, f"{where}: bbox {record.get('bbox')}")
    return finite & solid & inside


def check_trainable(counts: Mapping[str, int], source: Path) -> None:
    """Raise UserError when no class of `counts` (name -> number of objects, without crowds) has an object.

    A detector that trains on no object learns to answer "nothing", at a loss near 0.
    """
    if not sum(counts.values()):
        raise UserError(
            f"no training label is left in {source}: none of the classes {list(counts)} has an object "
            "(crowds do not count); check data.classes and the annotation file"
        )


def check_same_classes(train: Sequence[str], val: Sequence[str], source: Path) -> None:
    """Raise UserError when the validation set's classes are not those of the training set, in any order."""
    lacks, adds = sorted(set(train) - set(val)), sorted(set(val) - set(train))
    if lacks or adds:
        raise UserError(
            f"{source} must have the categories of the training set: it lacks {lacks} and adds {adds}; "
            "use matching annotation files, or name the common classes in data.classes"
        )
