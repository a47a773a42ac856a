"""Ultralytics YOLO: a text file per image, beside the images, and data.yaml, which names the splits and the classes.

A line is an object: `class cx cy width height`, or `class x1 y1 x2 y2 x3 y3 ...`, a polygon of three points or more;
all coordinates divided by the image's width and height. The label file of an image is found by its path: the last
folder `images` becomes `labels`, the suffix .txt (see `codetr.data.readers.yolo_files` for what else is found). An
image without a label file has no objects; a label file without an image is a broken record.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from codetr.data.readers import Document
from codetr.data.readers.folder import header, images_below, in_threads
from codetr.data.readers.yolo_files import (
    described_by,
    find_labels,
    listed_images,
    moved_place,
    settings_without_yaml,
)
from codetr.errors import UserError

_ROUNDING = 0.01  # how far outside of [0, 1] a coordinate may lie


def read(annotations: Path) -> Document:
    """`annotations` is the path of data.yaml with the split behind it: mine/data.yaml/train.

    In data.yaml, `train`, `val`, ... are a folder of images (with the folders in it), a .txt file that lists images
    line by line, or a list of these, below `path`. `names` is a list, or a mapping from class numbers, which are the
    category ids. Image ids count from 1; file names are relative to the folder of data.yaml.

    Without a data.yaml, the lists of classes and images that CVAT and Label Studio write take its place.

    Raises UserError for a data.yaml that does not say so. Broken images and lines are records without sizes or boxes,
    which say `where`.
    """
    source, split = annotations.parent, annotations.name
    settings = _settings(source, split)
    home = Path(os.path.abspath(source.parent))
    places = [_find(source, str(settings.get("path") or ""), str(place)) for place in _listed(settings[split])]
    paths = [path for place in places for path in _images(place)]
    if not paths:
        raise UserError(f"{source}: no image in {', '.join(map(str, places))}, where `{split}` points to")
    labels, label_folders, strays = find_labels(paths)
    names = _names(source, settings)
    sizes = in_threads(header, paths, "image sizes")
    images = [
        {"id": number, "file_name": _relative(path, home), **size}
        for number, (path, size) in enumerate(zip(paths, sizes, strict=True), start=1)
    ]
    texts = in_threads(_text, labels, "labels")
    written = [path for path, text in zip(labels, texts, strict=True) if text is not None]
    folders = {_existing(folder) for folder in {*(path.parent for path in paths), *label_folders}}
    return {
        "categories": [{"id": number, "name": name} for number, name in names.items()],
        "images": images,
        "annotations": chain(
            _objects(images, texts, [_relative(path, home) for path in labels]),
            ({"category_id": min(names), "where": f"{_relative(p, home)}: no image has this name"} for p in strays),
        ),
        "sources": [*described_by(source), *places, *sorted(folders), *written],
    }


def _settings(source: Path, split: str) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(source.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        if not list(source.parent.glob("*.y*ml")) and (found := settings_without_yaml(source.parent, split)):
            return found
        others = ", ".join(f"{p.name}/{split}" for p in sorted(source.parent.glob("*.y*ml")))
        advice = f"perhaps {others} is meant" if others else "it names the folders of images and the classes"
        raise UserError(f"{source} does not exist: {advice}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{source} cannot be read as YAML: {error}") from error
    if not isinstance(settings, dict):
        raise UserError(f"{source} is not the data.yaml of a YOLO set: no `names`, no `{split}`")
    if not settings.get(split):
        raise UserError(f"{source} has no `{split}`: add where those images are, such as {split}: images/{split}")
    if "kpt_shape" in settings:
        raise UserError(f"{source} has `kpt_shape`: its labels are key points, which are not read")
    return settings


def _names(source: Path, settings: dict[str, Any]) -> dict[int, str]:
    names = settings.get("names")
    numbered = dict(enumerate(names)) if isinstance(names, list) else names
    if not isinstance(numbered, dict) or not numbered or not all(type(k) is int for k in numbered):
        raise UserError(f"{source}: `names` must list the classes, or map their numbers to names, such as 0: cat")
    return {number: str(name) for number, name in sorted(numbered.items())}


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _find(source: Path, root: str, place: str) -> Path:
    """The absolute path of a `place` that a split names.

    root: `path` of data.yaml, which counts from its folder or the current one; when it leads nowhere, the set was moved
    and data.yaml lies in its root. A leading ../ of a place is often one too many.
    """
    roots = [source.parent / root, Path(os.path.abspath(root)), source.parent]
    shorter = [place.removeprefix("../")] if place.startswith("../") else []
    tried = [Path(os.path.abspath(r / p)) for p in [place, *shorter] for r in roots]
    moved = [moved_place(source.parent, path) for path in (place, f"{root}/{place}")]
    for path in [*tried, *filter(None, moved)]:
        if path.exists():
            return path
    raise UserError(f"{source} points to {place}, but there is no {' or '.join(map(str, dict.fromkeys(tried)))}")


def _images(place: Path) -> list[Path]:
    """A list names images from the current folder, or from its own where a line starts with ./."""
    if place.is_dir():
        return images_below(place)
    if place.suffix != ".txt":
        return [place]
    lines = [line.strip() for line in place.read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if line]
    return listed_images(place, lines, [_listed_image(place.parent, line) for line in lines])


def _listed_image(folder: Path, line: str) -> Path:
    beside, here = (Path(os.path.abspath(p)) for p in (folder / line, line))
    return beside if beside.exists() or not here.exists() else here


def _existing(folder: Path) -> Path:
    """The folder itself, or the one in which it would appear."""
    return next(f for f in (folder, *folder.parents) if f.is_dir())


def _relative(path: Path, home: Path) -> str:
    return path.relative_to(home).as_posix() if path.is_relative_to(home) else path.as_posix()


def _text(path: Path) -> str | Exception | None:
    """The text of a file; None if there is no such file, the reason if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        return error


def _objects(
    images: list[dict[str, Any]], texts: list[str | Exception | None], names: list[str]
) -> Iterator[dict[str, Any]]:
    for image, text, name in zip(images, texts, names, strict=True):
        if isinstance(text, Exception):
            yield {"image_id": image["id"], **_bad([""], name, f"cannot be read as text ({text})")}
            continue
        size = np.array([image.get("width", 1), image.get("height", 1)], np.float64)
        for number, line in enumerate((text or "").splitlines(), start=1):
            if line.strip():
                yield {"image_id": image["id"], **_object(line.split(), size, f"{name}, line {number}")}


def _object(fields: list[str], size: np.ndarray, where: str) -> dict[str, Any]:
    """size: [2], the image's width and height."""
    bad = partial(_bad, fields, where)
    try:
        label, *rest = map(float, fields)
    except ValueError:
        return bad("not only numbers")
    values = np.array(rest, np.float64)
    if not label.is_integer():
        return bad(f"{fields[0]} is no class number")
    if len(values) != 4 and (len(values) < 6 or len(values) % 2):
        return bad(f"{len(fields)} numbers, neither 5 (class cx cy width height) nor a class and three points or more")
    if not ((values >= -_ROUNDING) & (values <= 1 + _ROUNDING)).all():
        return bad("coordinates must be divided by the image's width and height, and so lie between 0 and 1")
    record = {"category_id": int(label), "where": where}
    if len(values) == 4:
        centre, extent = values[:2] * size, values[2:] * size
        return record | {"bbox": [*(centre - extent / 2).tolist(), *extent.tolist()]}
    points = values.reshape(-1, 2) * size
    low, high = points.min(0), points.max(0)
    return record | {
        "bbox": [*low.tolist(), *(high - low).tolist()],
        "area": _area(points),
        "segmentation": [points.ravel().tolist()],
    }


def _bad(fields: list[str], where: str, why: str) -> dict[str, Any]:
    """A record that the checks find. The class is kept if it can be, so that the box alone is blamed."""
    label = int(fields[0]) if fields[0].isdecimal() else None
    return {"category_id": label, "bbox": None, "where": f"{where}: {why}"}


def _area(points: np.ndarray) -> float:
    """The area of a polygon [n, 2]."""
    (x, y), (nx, ny) = points.T, np.roll(points, -1, 0).T
    return float(abs(np.sum(x * ny - nx * y)) / 2)
