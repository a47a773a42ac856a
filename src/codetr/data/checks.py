"""What can be wrong with classes and image files, found before any training time is spent on them.

Structural faults (no file, no JSON, no categories) always stop. Bad records follow `on_error`: "stop" raises one
UserError that names the first few of every kind; "skip" drops them and logs one summary.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np

from codetr.data.findings import Findings
from codetr.data.images import UnreadableImage, looks_complete, read_image
from codetr.data.names import advice_on, find_misspelt
from codetr.data.table import Table, texts
from codetr.errors import UserError

Verify = Literal["exists", "complete", "decode"]

_log = logging.getLogger(__name__)
_NAMES = 1 << 18  # at once


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
    table: Table, root: Path, verify: Verify, findings: Findings, max_pixels: int | None = None
) -> tuple[np.ndarray, dict[int, str]]:
    """Which image files of `table`, below `root`, can be used: [n] bool; and, for each image whose file is found under
    another name than the table's, that name.

    verify: "exists" asks for the file, "complete" also for a header and an end of file that fit (suspicious files are
        decoded), "decode" decodes every file.
    max_pixels: see `images.opened`.

    Raises UserError when `root` is not a folder.
    """
    if not root.is_dir():
        raise UserError(f"image folder {root} does not exist: check the paths under `data`")
    present = _present(root, table)
    missing = {i: table.name(i) for i in (~present).nonzero()[0].tolist()}
    others = chain.from_iterable(table.names_from(i, _NAMES) for i in range(0, len(table), _NAMES))
    found = find_misspelt(root, missing, (name for name, there in zip(others, present, strict=True) if there))
    present[list(found)] = True
    for i, name in found.items():
        findings.add("image file of another spelling", f"image {table.image_ids[i]} ({missing[i]}) is {name}")

    def place(i: int) -> Path:
        return root / found.get(i, table.name(i))

    def named(i: int) -> str:
        return f"image {table.image_ids[i]} ({place(i)}{advice_on(table.name(i))})"

    findings.add_all("missing image file", ~present, named)
    if verify == "exists":
        return present, found
    with ThreadPoolExecutor(16) as pool:
        rows = present.nonzero()[0].tolist()
        faults = pool.map(lambda i: _fault(place(i), tuple(table.sizes[i].tolist()), verify, max_pixels), rows)
        for i, fault in zip(rows, faults, strict=True):
            if fault:
                findings.add(fault.rule, f"image {table.image_ids[i]} ({fault})")
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


def _fault(path: Path, size: tuple[int, int], verify: Verify, max_pixels: int | None) -> UnreadableImage | None:
    small = max_pixels is None or size[0] * size[1] <= max_pixels
    if verify == "complete" and small and looks_complete(path, size):
        return None
    try:
        read_image(path, size, max_pixels)
    except UnreadableImage as error:
        return error
    return None


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

    train: names of the classes. Those without objects in the validation file are trained all the same, and said.
    val: name -> number of objects of the classes trained.
    others: name -> number of objects of the other categories.
    source: the validation file.
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
