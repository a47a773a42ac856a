"""Faults of categories, and of image records and their files."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from codetr.data.checks import root_category
from codetr.data.findings import Picture
from codetr.data.image_records import judge_images
from codetr.data.judge import WRITTEN, Record
from codetr.data.names import advice_on, find_files
from codetr.data.values import whole
from codetr.inspection.files import File, examine
from codetr.inspection.split import Split

Progress = Callable[[Iterable[File], int], Iterable[File]]
_SMALL_IMAGE = 32  # pixels on the shorter side
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
    for name, count in Counter(classes or ()).items():
        if count > 1:
            split.add("unknown class in data.classes", f"{name} is named more than once")


def _root(split: Split) -> int | None:
    """The position of the category that holds the others, if it has no object."""
    root = root_category(split.categories)
    if root is None or any(whole(a.get("category_id")) == split.categories[root]["id"] for a in split.annotations):
        return None
    split.add("root of the categories", f"category {split.categories[root]['id']} ({split.categories[root]['name']})")
    return root


def inspect_images(split: Split, decode: bool, progress: Progress, max_pixels: int | None = None) -> None:
    """Image records, then their files. decode: read every file to its end."""
    if not split.images:
        split.add("no images", "`images` is empty")
    files: set[str] = set()
    for position, (record, changes, was, fault) in enumerate(judge_images(list(split.images))):
        if changes:
            split.change_image(position, WRITTEN, f"{split.image_name(position)}: {was}", **changes)
        if fault:
            split.drop_image(position, "bad image record", f"{split.image_name(position)}: {fault}")
        elif record["id"] in split.usable:
            first = split.usable[record["id"]]
            if split.images[first]["file_name"] != record["file_name"]:
                split.repair.images.add(first)  # whose the annotations are cannot be told
            what = f"{split.image_name(position)} has the id of {split.images[first]['file_name']}"
            split.drop_image(position, "duplicate image id", what)
        else:
            split.usable[record["id"]] = position
            if record["file_name"] in files:
                split.add("image file listed twice", split.image_name(position))
            files.add(record["file_name"])
    good = list(split.usable.values())
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
    for i, file in find_files(split.root, {i: split.images[i]["file_name"] for i in good}).items():
        if file != split.images[i]["file_name"]:
            what = f"{split.image_name(i)} is {file}"
            split.change_image(i, "image file of another spelling", what, file_name=file)


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
