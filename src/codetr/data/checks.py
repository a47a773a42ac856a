"""What can be wrong with a data set, found before any training time is spent on it.

Structural faults (no file, no JSON, no categories) always stop. Bad records follow `on_error`: "stop" raises one
UserError that names the first few of every kind; "skip" drops them and logs one summary.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np

from codetr.data.images import UnreadableImage, looks_complete, read_image
from codetr.data.names import advice_on, find_misspelt
from codetr.data.rules import BOX_KINDS, KINDS, REFUSED_BOXES, box_kinds
from codetr.data.table import Table, texts
from codetr.errors import UserError

OnError = Literal["stop", "skip"]
Verify = Literal["exists", "complete", "decode"]

_log = logging.getLogger(__name__)
_SHOWN = 3
_NAMES = 1 << 18  # at once


@dataclass
class Report:
    """Problems found in one annotation file. counts: kind -> number; examples: kind -> the first few records.

    told: of kinds that cost no record, what is read instead or what to know. clipped: number of boxes that reach out of
    their image and were clipped for training. All kinds are those of `codetr.data.rules`.
    """

    source: Path
    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    told: dict[str, int] = field(default_factory=dict)
    clipped: int = 0

    def add(self, kind: str, record: str) -> None:
        self.add_all(kind, np.ones(1, bool), lambda _: record)

    def add_all(self, kind: str, bad: np.ndarray, name: Callable[[int], str]) -> None:
        """Add every record i where bad[i]; name(i) is asked for those that are shown."""
        rows = bad.nonzero()[0]
        if not len(rows):
            return
        shown = self.examples.setdefault(kind, [])
        shown += [name(int(i)) for i in rows[: _SHOWN - len(shown)]]
        counts = self.counts if KINDS[kind].severity == "error" else self.told
        counts[kind] = counts.get(kind, 0) + len(rows)

    def __str__(self) -> str:
        lines = []
        for kind, count in (self.counts | self.told).items():
            more = "" if count <= _SHOWN else ", ..."
            lines.append(f"  {count} x {kind}: {', '.join(self.examples[kind])}{more} ({KINDS[kind].advice})")
        if self.clipped:
            lines.append(f"  {self.clipped} x box partly outside its image: clipped for training")
        return "\n".join(lines)

    def settle(self, on_error: OnError) -> None:
        """Raise UserError on problems when `on_error` is "stop", and on those of the whole file; log what is dropped
        when it is "skip", and what is told."""
        total = sum(self.counts.values())
        if any(KINDS[kind].whole for kind in self.counts):
            raise UserError(f"{self.source}: nothing can be learned from this file as it is\n{self}")
        if total and on_error == "stop":
            raise UserError(
                f"{self.source}: {total} bad record{'s' * (total > 1)}\n{self}\n"
                "Mend them, or set data.on_error=skip to train without them."
            )
        if total:
            _log.warning("%s: %d bad records dropped\n%s", self.source, total, self)
        elif any(KINDS[kind].severity == "warning" for kind in self.told):
            _log.warning("%s:\n%s", self.source, self)
        elif self.told or self.clipped:
            _log.info("%s:\n%s", self.source, self)


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


def root_category(categories: Sequence[Mapping[str, Any]]) -> int | None:
    """The position of the category that only holds the others, as Roboflow writes: its own `supercategory` is "none",
    and that of all others, or the name of one of them, is its name. It is none of the classes while it has no object.
    """
    for position, root in enumerate(categories):
        others = [*categories[:position], *categories[position + 1 :]]
        if root.get("supercategory") != "none" or not others or type(root.get("id")) is not int:
            continue
        holds = all(c.get("supercategory") == root.get("name") for c in others)
        if (holds or root.get("name") in [c.get("name") for c in others]) and root["id"] not in _ids(others):
            return position
    return None


def _ids(categories: Iterable[Mapping[str, Any]]) -> list[Any]:
    return [c.get("id") for c in categories]


def _repeated(values: Iterable[Any]) -> list[Any]:
    seen: set[Any] = set()
    return [v for v in values if v in seen or seen.add(v)]  # type: ignore[func-returns-value]


def check_files(
    table: Table, root: Path, verify: Verify, report: Report, max_pixels: int | None = None
) -> tuple[np.ndarray, dict[int, str]]:
    """[n] bool, which image files of `table` can be used; they lie below `root`. Image -> name of those that are found
    under another name than the table's.

    verify: "exists" asks for the file, "complete" also for a header and an end of file that fit (suspicious files are
    decoded), "decode" decodes every file. max_pixels: see `images.opened`. Raises UserError when `root` is not a
    folder.
    """
    if not root.is_dir():
        raise UserError(f"image folder {root} does not exist: check the paths under `data`")
    present = _present(root, table)
    missing = {i: table.name(i) for i in (~present).nonzero()[0].tolist()}
    others = chain.from_iterable(table.names_from(i, _NAMES) for i in range(0, len(table), _NAMES))
    found = find_misspelt(root, missing, (name for name, there in zip(others, present, strict=True) if there))
    present[list(found)] = True
    for i, name in found.items():
        report.add("image file of another spelling", f"image {table.image_ids[i]} ({missing[i]}) is {name}")

    def place(i: int) -> Path:
        return root / found.get(i, table.name(i))

    def named(i: int) -> str:
        return f"image {table.image_ids[i]} ({place(i)}{advice_on(table.name(i))})"

    report.add_all("missing image file", ~present, named)
    if verify == "exists":
        return present, found
    with ThreadPoolExecutor(16) as pool:
        rows = present.nonzero()[0].tolist()
        faults = pool.map(lambda i: _fault(place(i), tuple(table.sizes[i].tolist()), verify, max_pixels), rows)
        for i, fault in zip(rows, faults, strict=True):
            if fault:
                report.add("unreadable image file", f"image {table.image_ids[i]} ({fault})")
                present[i] = False
    return present, found


def _present(root: Path, table: Table) -> np.ndarray:
    """[n] bool; one listing per folder, which is much faster than asking file by file."""
    files: set[str] = set()
    for folder in texts(table.folders):
        path = root / folder
        if path.is_dir():
            prefix = folder and f"{folder}/"
            files.update(prefix + entry.name for entry in os.scandir(path))
    parts = (map(files.__contains__, table.names_from(i, _NAMES)) for i in range(0, len(table), _NAMES))
    return np.fromiter(chain.from_iterable(parts), bool, len(table))


def _fault(path: Path, size: tuple[int, int], verify: Verify, max_pixels: int | None) -> str:
    small = max_pixels is None or size[0] * size[1] <= max_pixels
    if verify == "complete" and small and looks_complete(path, size):
        return ""
    try:
        read_image(path, size, max_pixels)
    except UnreadableImage as error:
        return str(error)
    return ""


def check_boxes(boxes: np.ndarray, extent: np.ndarray, report: Report, name: Callable[[int], str]) -> np.ndarray:
    """[n] bool, which `boxes` ([n, 4] xywh in pixels) are good; counts those that reach out of their image.

    extent: [n, 2] (width, height) of their images. name: what messages call box i.
    """
    kinds = box_kinds(boxes, extent)
    for position, kind in enumerate(BOX_KINDS[:REFUSED_BOXES]):
        report.add_all(kind, kinds == position, name)
    good = (kinds < 0) | (kinds >= REFUSED_BOXES)
    with np.errstate(over="ignore", invalid="ignore"):
        reach_out = (boxes[:, :2] < 0) | (boxes[:, :2] + boxes[:, 2:] > extent)
    report.clipped += int((reach_out.any(1) & good).sum())
    return good


def check_trainable(counts: Mapping[str, int], source: Path) -> None:
    """Raise UserError when no class of `counts` (name -> number of objects, without crowds) has an object.

    A detector that trains on no object learns to answer "nothing", at a loss near 0.
    """
    if not sum(counts.values()):
        raise UserError(
            f"no training label is left in {source}: none of the classes {list(counts)} has an object "
            "(crowds, `iscrowd` 1, do not count); check data.classes and the annotation file"
        )


def check_val_classes(train: Sequence[str], val: Mapping[str, int], others: Mapping[str, int], source: Path) -> None:
    """Raise UserError when the validation file has objects of categories that the training file lacks.

    val: name -> number of objects of the classes trained; others: of the other categories. Classes of `train` without
    objects there are trained all the same, and said.
    """
    foreign = [name for name, count in others.items() if count]
    empty = [name for name in train if not val.get(name)]
    if foreign:
        names = f"[{','.join(train)}]"
        raise UserError(
            f"{source} has objects of {foreign}, which the training file does not name"
            f"{f', and none of {empty}' if empty else ''}: spell classes alike in both files, or leave them out with "
            f"'data.classes={names}'"
        )
    if empty:
        _log.info("%s has no objects of %s: they are trained, and not evaluated", source, empty)
