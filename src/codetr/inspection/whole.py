"""Faults that no single record shows: of a split as a whole, and between the two splits."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from codetr.data.findings import Picture
from codetr.inspection.files import SUFFIXES, same_content
from codetr.inspection.split import Split


def inspect_balance(split: Split, classes: Sequence[str] | None, step: int) -> None:
    """Images without objects, categories without, and too little of all. step: training images per step."""
    objects = object_counts(split)
    names = {c["id"]: c.get("name") for c in split.categories if type(c.get("id")) is int}
    for key, name in names.items():
        if not objects[key] and (classes is None or name in classes):
            split.add("unused category", f"category {key} ({name}) has no object")
    chosen = sum(n for key, n in objects.items() if classes is None or names.get(key) in classes)
    if split.name == "train" and not chosen:
        split.add("no objects", f"{split.findings.source}: none of the classes has an object (crowds do not count)")
    filled = {split.image_of(i) for i in split.boxes if split.is_object(i)}
    for position in split.usable.values():
        file = split.files[position]
        if position not in filled and file and not file.fault:
            split.add("image without objects", split.image_name(position), Picture(file.path))
    usable = sum(1 for f in split.files if f and not f.fault)
    if split.name == "train" and 0 < usable < step:
        split.add("fewer images than one step takes", f"{usable} usable images, data.batch_size is {step}")


def object_counts(split: Split) -> Counter[int]:
    """Category id -> number of objects."""
    return Counter(split.annotations[i]["category_id"] for i in split.boxes if split.is_object(i))


def compare(train: Split, val: Split, classes: Sequence[str] | None) -> None:
    """Categories of both splits against each other."""
    ids = [
        {c["name"]: c["id"] for c in s.categories if isinstance(c.get("name"), str) and type(c.get("id")) is int}
        for s in (train, val)
    ]
    objects = object_counts(train), object_counts(val)
    wanted = [{n: i for n, i in own.items() if classes is None or n in classes} for own in ids]
    for name in [n for n in wanted[0] if n not in ids[1]]:
        val.add("category that a split lacks", f"{name}: {val.findings.source} has no such category")
    for name in [n for n in wanted[1] if n not in ids[0]]:
        kind = "category that training lacks" if objects[1][ids[1][name]] else "category that a split lacks"
        train.add(kind, f"{name}: {train.findings.source} has no such category")
    for name in [n for n in ids[1] if n in ids[0]]:
        there, here = ids[0][name], ids[1][name]
        if there != here:
            val.add("category with another id in the other split", f"{name}: {here} in val, {there} in train")
        if objects[1][here] and not objects[0][there] and (classes is None or name in classes):
            what = f"{name}: {objects[1][here]} objects in val, none in train"
            val.add("class to evaluate without training objects", what)


def find_copies(splits: Sequence[Split]) -> None:
    """Images of the same content, within a split and in both. One annotation file given twice is one finding."""
    sources = [s.findings.source.resolve() for s in splits]
    if len(splits) > 1 and len(set(sources)) == 1:
        splits[1].add("one file for both splits", f"{sources[0]} is data.train_annotations and data.val_annotations")
        splits = splits[:1]
    entries = [(s, i, f) for s in splits for i, f in enumerate(s.files) if f and not f.fault]
    for group in same_content([f for _, _, f in entries]):
        members = [entries[g] for g in group]
        for split in splits:
            own = [(i, f) for s, i, f in members if s is split]
            for i, file in own[1:]:
                if file.path != own[0][1].path:
                    what = f"{split.image_name(i)} is {split.image_name(own[0][0])}"
                    split.add("same image twice", what, Picture(file.path))
        _find_leak([m[:2] for m in members])


def find_unnamed(splits: Sequence[Split]) -> None:
    """Images in the folders of both splits that neither names; splits may share their folders."""
    named = {str(f.path) for s in splits for f in s.files if f}
    folders: dict[str, Split] = {}
    for split in splits:
        for folder in dict.fromkeys(str(f.path.parent) for f in split.files if f):
            folders.setdefault(folder, split)
    for folder, split in folders.items():
        for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
            path = os.path.normpath(os.path.join(folder, name))
            if os.path.splitext(name)[1].lower() in SUFFIXES and path not in named:
                split.add("file that no record names", path, Picture(Path(path)))


def _find_leak(members: Sequence[tuple[Split, int]]) -> None:
    val = [(s, i) for s, i in members if s.name == "val"]
    for split, i in members:
        if split.name == "train" and val:
            other, j = val[0]
            file = split.files[i]
            what = f"{split.image_name(i)} is {other.image_name(j)} of {other.findings.source.name}"
            split.drop_image(i, "same image in train and val", what, Picture(file.path) if file else None)
