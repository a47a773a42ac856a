"""Faults of categories, of image records and their files, and of annotation records."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from codetr.data.checks import root_category
from codetr.data.inspection.files import File, examine
from codetr.data.inspection.findings import Picture
from codetr.data.inspection.split import Record, Split, repeated
from codetr.data.names import advice_on, find_misspelt
from codetr.data.values import flag, mended_image, mended_object, whole

Progress = Callable[[Iterable[File], int], Iterable[File]]
_SMALL_IMAGE = 32  # pixels on the shorter side
_WRITTEN = "value of another type"
_PLAIN_MODES = ("RGB", "L", "P", "RGBA", "1", "LA")


def inspect_categories(split: Split, classes: Sequence[str] | None) -> None:
    """classes: those to train; None for all."""
    ids: dict[int, Record] = {}
    names: dict[str, str] = {}
    root = _root(split)
    for position, record in enumerate(split.categories):
        if position == root:
            continue
        key, name = record.get("id"), record.get("name")
        what = f"category {key if 'id' in record else f'number {position}'} ({name})"
        if type(key) is not int:
            split.add("bad category record", f"{what}: id {key!r} is not a whole number")
        elif not isinstance(name, str) or not name.strip():
            split.add("bad category record", f"{what}: name {name!r} is no text")
        elif key in ids:
            if same := {**ids[key]} == record:
                split.repair.categories.add(position)
            split.findings.add("duplicate category id", f"{what} after {ids[key]['name']}", mended=same)
        elif name in names.values():
            split.add("duplicate category name", what)
        elif near := names.get(name.casefold().strip()):
            split.add("category names that are nearly the same", f"{what} and {near}")
        if type(key) is int and isinstance(name, str):
            ids.setdefault(key, record)
            names.setdefault(name.casefold().strip(), name)
    split.categories = [c for i, c in enumerate(split.categories) if i != root]
    for name in classes or ():
        if name not in [c.get("name") for c in split.categories]:
            split.add("unknown class in data.classes", f"{name}, not among {sorted(names.values())}")
    for i in repeated(classes or ()):
        split.add("unknown class in data.classes", f"{(classes or ())[i]} is named more than once")


def _root(split: Split) -> int | None:
    """The position of the category that holds the others, if it has no object."""
    root = root_category(split.categories)
    if root is None or any(whole(a.get("category_id")) == split.categories[root]["id"] for a in split.annotations):
        return None
    split.add("root of the categories", f"category {split.categories[root]['id']} ({split.categories[root]['name']})")
    return root


def mend_images(split: Split) -> None:
    """Numbers that are written as text, or whole ones with a point, become what they mean."""
    for i, record in enumerate(split.images):
        if changes := mended_image(record):
            split.images[i] = record | changes
            split.change_image(i, _WRITTEN, f"{split.image_name(i)}: {_was(record, changes)}", **changes)


def mend_annotations(split: Split) -> None:
    """The same; images are inspected before."""
    for i, record in enumerate(split.annotations):
        if changes := mended_object(record):
            split.annotations[i] = record | changes
            split.change(i, _WRITTEN, f"{split.annotation_name(i)}: {_was(record, changes)}", **changes)


def _was(record: Record, changes: Record) -> str:
    return ", ".join(f"{key} {record[key]!r}" for key in changes)


def inspect_images(split: Split, decode: bool, progress: Progress, max_pixels: int | None = None) -> None:
    """Image records, then their files. decode: read every file to its end."""
    if not split.images:
        split.add("no images", "`images` is empty")
    good = []
    files: set[str] = set()
    for position, record in enumerate(split.images):
        if wrong := _record_fault(record):
            split.drop_image(position, "bad image record", f"{split.image_name(position)}: {wrong}")
        elif record["id"] in split.usable:
            first = split.usable[record["id"]]
            if split.images[first]["file_name"] != record["file_name"]:
                split.repair.images.add(first)  # whose the annotations are cannot be told
            what = f"{split.image_name(position)} has the id of {split.images[first]['file_name']}"
            split.drop_image(position, "duplicate image id", what)
        else:
            split.usable[record["id"]] = position
            good.append(position)
            if record["file_name"] in files:
                split.add("image file listed twice", split.image_name(position))
            files.add(record["file_name"])
    split.files = [None] * len(split.images)
    if not split.root.is_dir():
        split.add("no image folder", f"{split.root} is no folder")
        return
    _find_files(split, good)
    wanted = [(split.root / split.images[i]["file_name"], split.size(i)) for i in good]
    for position, file in zip(good, progress(examine(wanted, decode, max_pixels), len(good)), strict=True):
        split.files[position] = file
        _inspect_file(split, position, file)


def _find_files(split: Split, good: Sequence[int]) -> None:
    """Names that mean a file which is spelt otherwise become its name."""
    names = {i: split.images[i]["file_name"] for i in good}
    missing = {i: name for i, name in names.items() if not (split.root / name).exists()}
    for i, file in find_misspelt(split.root, missing, (n for j, n in names.items() if j not in missing)).items():
        what = f"{split.image_name(i)} is {file}"
        split.change_image(i, "image file of another spelling", what, file_name=file)
        split.images[i] = split.images[i] | {"file_name": file}


def _record_fault(record: Record) -> str | None:
    for key in ("id", "width", "height"):
        value = record.get(key)
        if type(value) is not int:
            return f"{key} is {value!r}, not a whole number" if key in record else f"has no {key}"
        if key != "id" and value <= 0:
            return f"{key} is {value}"
    name = record.get("file_name")
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        return f"file_name is {name!r}" if "file_name" in record else "has no file_name"
    return None


def _inspect_file(split: Split, position: int, file: File) -> None:
    name = split.image_name(position)
    if file.fault:
        kind, wrong = file.fault
        readable = kind == "image of another size"
        missing = kind == "missing image file"
        hint = _other_spelling(file) + advice_on(split.images[position]["file_name"]) if missing else ""
        picture = Picture(file.path) if readable else None
        split.drop_image(position, kind, f"{name}: {file.path} {wrong}{hint}", picture)
        return
    picture = Picture(file.path)
    if file.orientation != 1:
        split.add("turned by EXIF", f"{name}: orientation {file.orientation}", picture)
    if file.misnamed:
        split.add("file of another type than its name says", f"{name}: is a {file.type}", picture)
    if file.mode not in _PLAIN_MODES:
        split.add("unusual pixels", f"{name}: mode {file.mode}", picture)
    if file.frames > 1:
        split.add("moving picture", f"{name}: {file.frames} frames", picture)
    if min(file.size) < _SMALL_IMAGE:
        split.add("very small image", f"{name}: {file.size[0]}x{file.size[1]} pixels", picture)
    if os.path.relpath(os.path.abspath(file.path), os.path.abspath(split.root)).startswith(".."):
        split.add("image outside its folder", f"{name}: {file.path}", picture)


def _other_spelling(file: File) -> str:
    """A file beside it whose name differs in case or suffix only."""
    if not file.path.parent.is_dir():
        return f"; there is no folder {file.path.parent}"
    stem = file.path.stem.casefold()
    near = [p.name for p in file.path.parent.glob("*") if p.stem.casefold() == stem] if stem else []
    return f"; there is {', '.join(sorted(near)[:3])}" if near else ""


def inspect_annotations(split: Split) -> None:
    """What annotations refer to, and their numbers apart from the box; see `boxes` and `masks` for the rest."""
    categories = {c["id"] for c in split.categories if type(c.get("id")) is int}
    known = {i.get("id") for i in split.images if type(i.get("id")) is int}
    again = repeated(repr(a.get("id", i)) for i, a in enumerate(split.annotations))
    for i, record in enumerate(split.annotations):
        name, image, category = split.annotation_name(i), record.get("image_id"), record.get("category_id")
        if "where" not in record and type(record.get("id")) is not int:
            split.add("annotation without id", f"{name}: id {record.get('id')!r}")
        if i in again:
            split.drop_annotation(i, "duplicate annotation id", name)
        if type(image) is not int or image not in known:
            split.drop_annotation(i, "annotation of an unknown image", f"{name} (image {image!r})")
        if type(category) is not int or category not in categories:
            split.drop_annotation(i, "unknown category id", f"{name} (category {category!r})")
        for key in ("iscrowd", "ignore"):
            if flag(record.get(key)) is None:
                split.drop_annotation(i, "flag that is not 0 or 1", f"{name}: {key} {record[key]!r}")
        _inspect_area(split, i, name)
    _inspect_image_lists(split, categories)


def _inspect_area(split: Split, position: int, name: str) -> None:
    record = split.annotations[position]
    if "area" not in record:
        return
    area, box = record["area"], numbers(record.get("bbox"), 4)
    extent = box[2] * box[3] if box else math.nan
    if type(area) not in (int, float) or not math.isfinite(area) or area <= 0:
        split.change(position, "area that is not a number above 0", f"{name}: area {area!r}", area=extent)
    elif area > 1.05 * extent + 1 and extent > 0:
        split.add("area larger than the box", f"{name}: area {area}, box {extent:.6g}", split.picture(position))


def _inspect_image_lists(split: Split, categories: set[int]) -> None:
    """LVIS' lists of the categories that an image has not, or has more of than is drawn."""
    excluded = {}
    for position, record in enumerate(split.images):
        for key in ("neg_category_ids", "not_exhaustive_category_ids"):
            values = record.get(key) or []
            unknown = [c for c in values if c not in categories] if isinstance(values, list) else [values]
            if unknown:
                split.add("image list with an unknown category", f"{split.image_name(position)}: {key} has {unknown}")
        if record.get("neg_category_ids") and type(record.get("id")) is int:
            excluded[record["id"]] = record["neg_category_ids"]
    for i, record in enumerate(split.annotations if excluded else ()):
        if type(record.get("image_id")) is int and record.get("category_id") in excluded.get(record["image_id"], ()):
            what = f"{split.annotation_name(i)} (category {record['category_id']})"
            split.add("object of a category that its image excludes", what, split.picture(i))


def numbers(value: Any, count: int) -> tuple[float, ...] | None:
    """`count` finite numbers, or None if `value` is no list of them."""
    if not isinstance(value, (list, tuple)) or len(value) != count:
        return None
    if not all(type(v) in (int, float) or isinstance(v, np.number) for v in value):
        return None
    row = tuple(map(float, value))
    return row if all(map(math.isfinite, row)) else None
