"""Where the files of a YOLO set lie, as the tools that write them have it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import yaml

from codetr.data.names import find_misspelt, is_foreign
from codetr.data.readers.folder import is_image
from codetr.errors import UserError

_SPLITS = {"train": ("train", "training"), "val": ("valid", "val", "validation", "test")}


class Labels(NamedTuple):
    """files: of each image, its label file or where it would be.
    folders: those that were looked into.
    strays: label files that belong to no image.
    """

    files: list[Path]
    folders: set[Path]
    strays: list[Path]


def find_labels(images: Sequence[Path]) -> Labels:
    """Find the label files of images, which are given by their absolute paths.

    The labels of an image are NAME.txt where the last folder `images` of the path is called `labels`, or beside the
    image, or in a folder `labels` beside it or beside its folder. The case of letters only counts where two files
    differ in nothing else.
    """
    entries = cache(_text_files)
    places = {folder: _places(folder) for folder in dict.fromkeys(path.parent for path in images)}
    near = [
        [place / n for place in places[p.parent] for n in entries(place).get(p.stem.casefold(), ())] for p in images
    ]
    files = [next((n for n in names if n.name == f"{p.stem}.txt"), None) for p, names in zip(images, near, strict=True)]
    taken = {path for path in files if path}
    for i, names in enumerate(near):
        free = [path for path in names if path not in taken]
        if files[i] is None and len(free) == 1:
            files[i] = free[0]
            taken.add(free[0])
    return Labels(
        [file or places[path.parent][0] / f"{path.stem}.txt" for file, path in zip(files, images, strict=True)],
        {place for found in places.values() for place in found},
        [file for folder in places for file in _strays(folder, taken)],
    )


def _places(folder: Path) -> list[Path]:
    """The folders in which labels of the images of `folder` may lie, the usual one first."""
    mapped = _mapped(folder)
    beside = [_entry(folder, "labels"), _entry(folder.parent, "labels")]
    return list(dict.fromkeys([*([mapped] if mapped else []), folder, *(p for p in beside if p.is_dir())]))


def _mapped(folder: Path) -> Path | None:
    """The folder with `labels` for the last `images` of its path."""
    parts = folder.parts
    at = next((i for i in reversed(range(len(parts))) if parts[i].casefold() == "images"), None)
    if at is None:
        return None
    place = Path(*parts[:at])
    for part in ("labels", *parts[at + 1 :]):
        place = _entry(place, part)
    return place


def _entry(folder: Path, name: str) -> Path:
    """The entry of `folder` with this name, in other letters if need be."""
    if (folder / name).exists() or not folder.is_dir():
        return folder / name
    near = [p for p in folder.iterdir() if p.name.casefold() == name.casefold()]
    return near[0] if len(near) == 1 else folder / name


def _text_files(folder: Path) -> dict[str, list[str]]:
    """Names of text files, by what they are without suffix in small letters."""
    names: dict[str, list[str]] = {}
    for name in sorted(os.listdir(folder)) if folder.is_dir() else ():
        stem, suffix = os.path.splitext(name)
        if suffix.casefold() == ".txt":
            names.setdefault(stem.casefold(), []).append(name)
    return names


def _strays(folder: Path, taken: set[Path]) -> Iterator[Path]:
    """Label files with something in them of which no image has the name; `folder` may hold images of other splits."""
    place = _mapped(folder)
    if place is None:
        return
    stems = {p.stem for p in folder.iterdir() if is_image(p)}
    for path in (place / name for names in _text_files(place).values() for name in names):
        if path not in taken and path.stem not in {*stems, "classes"} and path.stat().st_size:
            yield path


def listed_images(place: Path, lines: Sequence[str], found: Sequence[Path]) -> list[Path]:
    """The images of a list's lines, of which `found` is the usual reading: where there is no such file, the one below
    the list's folder that the line must mean. CVAT's lists count from a folder `data` that its archives lack.
    """
    missing = {i: line.removeprefix("data/") for i, line in enumerate(lines) if not found[i].exists()}
    files = find_misspelt(place.parent, missing)
    return [place.parent / files[i] if i in files else path for i, path in enumerate(found)]


def moved_place(home: Path, path: str) -> Path | None:
    """The longest end of a Windows path, or of one of another machine, that exists below `home`."""
    plain = path.replace("\\", "/")
    parts = PurePosixPath(plain).parts
    ends = [home.joinpath(*parts[i:]) for i in range(len(parts)) if i == 0 or is_foreign(plain)]
    return next((end for end in ends if end != home and not parts[0].startswith("..") and end.exists()), None)


def settings_without_yaml(home: Path, split: str) -> dict[str, Any] | None:
    """What data.yaml would say of a folder that has none: exports of CVAT (obj.data, obj.names, train.txt) and of
    Label Studio (classes.txt, notes.json, images, labels). None where nothing names the classes.

    Raises UserError when nothing is called as the split is.
    """
    given = _darknet(home / "obj.data")
    names = _names(home, given)
    if names is None:
        return None
    words = _SPLITS.get(split, (split,))
    places = [str(given[w]).removeprefix("data/") for w in words if w in given]
    for word in words:
        places += [f"{word}.txt", f"images/{word}", f"{word}/images", word]
    if split == "train" and not any((home / f"images/{w}").is_dir() for w in _SPLITS["val"]):
        places += ["images", "obj_train_data", "."]
    for place in places:
        if (home / place).exists():
            return {"path": str(home.absolute()), split: place, "names": names}
    text = yaml.safe_dump({"train": "images", "val": "FOLDER", "names": names}, sort_keys=False, allow_unicode=True)
    raise UserError(
        f"{home} has no data.yaml, and no {' or '.join(f'{w}.txt, images/{w}' for w in words[:2])}: say which images "
        f"are `{split}` in {home / 'data.yaml'}, such as\n{text}"
    )


def described_by(source: Path) -> list[Path]:
    """data.yaml, or else the files that take its place and their folder."""
    if source.exists():
        return [source]
    lists = (source.parent / name for name in ("obj.data", "obj.names", "classes.txt", "notes.json"))
    return [source.parent, *(path for path in lists if path.is_file())]


def _darknet(path: Path) -> Mapping[str, str]:
    """The pairs of the lines `key = value`."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return {key.strip(): value.strip() for key, sign, value in (line.partition("=") for line in lines) if sign}


def _names(home: Path, given: Mapping[str, str]) -> dict[int, str] | None:
    lists = [given.get("names", "obj.names").removeprefix("data/"), "obj.names", "classes.txt", "labels/classes.txt"]
    for path in (home / name for name in lists):
        if path.is_file():
            lines = path.read_text(encoding="utf-8-sig").splitlines()
            return {i: line.strip() for i, line in enumerate(lines) if line.strip()}
    try:
        categories = json.loads((home / "notes.json").read_bytes())["categories"]
        return {int(c["id"]): str(c["name"]) for c in categories}
    except (OSError, ValueError, LookupError, TypeError):
        return None
