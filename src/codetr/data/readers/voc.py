"""Pascal VOC: an XML file per image.

Boxes are (xmin, ymin, xmax, ymax) with pixels counted from 1 and both ends inside the object [VOC 2012 development kit,
section 5.1]. Here a pixel covers the interval from its index to the next, so that

    x = xmin - 1, y = ymin - 1, width = xmax - xmin + 1, height = ymax - ymin + 1,

whether the numbers are whole or, as some tools and parts of VOC itself write them, not.

`difficult` becomes `ignore`: the VOC evaluation counts such an object neither when it is found nor when it is missed.
`truncated` is kept. `iscrowd`, which is not part of VOC, is understood where `codetr.data.writers` wrote it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any
from xml.etree import ElementTree

from codetr.data.readers import Document
from codetr.data.readers.folder import header, images_below, in_threads, progress
from codetr.errors import UserError

CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
FLAGS = {"difficult": "ignore", "truncated": "truncated", "iscrowd": "iscrowd"}  # in XML -> in a record
_CORNERS = ("xmin", "ymin", "xmax", "ymax")


def read(annotations: Path, *, names: Sequence[str] | None = None) -> Document:
    """The images that a list such as ImageSets/Main/train.txt names, or all of a folder of XML files.

    An XML file belongs to the image of its own name, whatever its `filename` says, if there is one; images are looked
    for in JPEGImages or images beside the folder of XML files, and in that folder. Image ids count from 1.

    Categories: `names` and what else the XML files of the folder name; without `names`, VOC's 20 if there are no
    others, else the names found, sorted. All files of the folder count, so that its splits agree. Ids count from 1.

    An XML file without a size takes that of its image.

    Raises UserError when there is no such list or folder, or no XML file. Broken files and objects are records
    without sizes or boxes, which say `where`.
    """
    folder, wanted = _wanted(annotations)
    paths = sorted(folder.rglob("*.xml"))
    if not paths:
        raise UserError(f"{folder}: holds no XML file; VOC sets have them in Annotations")
    present = [_stem(p, folder) for p in paths]
    stems = present if wanted is None else list(dict.fromkeys([*present, *wanted]))
    parsed = dict(zip(stems, progress(map(partial(_parse, folder), stems), len(stems), str(folder)), strict=True))
    categories = _categories((o["name"] for _, objects in parsed.values() for o in objects), names)
    files, image_folders = _image_files(folder)
    unsized = [s for s in stems if parsed[s][0].pop("unsized", False) and s in files]
    sizes = in_threads(header, [Path(*files[s]) for s in unsized], "image sizes")
    for stem, size in zip(unsized, sizes, strict=True):
        parsed[stem][0].update({"where": f"{folder.name}/{stem}.xml", **size})
    images, objects = [], []
    for number, stem in enumerate(stems if wanted is None else wanted, start=1):
        image, found = parsed[stem]
        named = PurePosixPath(stem).with_name(image.pop("filename", f"{PurePosixPath(stem).name}.jpg")).as_posix()
        images.append({"id": number, "file_name": files[stem][1] if stem in files else named, **image})
        objects += [
            {"image_id": number, "category_id": categories.get(o["name"])} | {k: v for k, v in o.items() if k != "name"}
            for o in found
        ]
    return {
        "categories": [{"id": number, "name": name} for name, number in categories.items()],
        "images": images,
        "annotations": objects,
        "sources": dict.fromkeys([annotations, folder, *image_folders, *(p.parent for p in paths), *paths]),
    }


def _wanted(annotations: Path) -> tuple[Path, list[str] | None]:
    """The folder of XML files, and which of them in which order; None for all."""
    if annotations.is_dir():
        return annotations, None
    try:
        lines = annotations.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise UserError(
            f"{annotations} does not exist: give a list such as ImageSets/Main/train.txt, or a folder of XML files"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{annotations} cannot be read: {error}") from error
    wanted = [line.strip() for line in lines if line.strip()]
    if not wanted:
        raise UserError(f"{annotations} names no image: write one name per line, without a suffix")
    here = annotations.absolute().parent
    beside = [here.parent.parent / "Annotations", here / "Annotations"]
    return next((f for f in beside if f.is_dir()), here), wanted


def _stem(path: Path, folder: Path) -> str:
    return path.relative_to(folder).with_suffix("").as_posix()


def _image_files(folder: Path) -> tuple[dict[str, tuple[Path, str]], list[Path]]:
    """Image names without suffix -> folder and name with it; the folders they were looked for in."""
    around = [folder, folder.absolute().parent / "images", folder.absolute().parent / "JPEGImages"]
    folders = [f for f in around if f.is_dir()]
    return {_stem(p, f): (f, p.relative_to(f).as_posix()) for f in folders for p in reversed(images_below(f))}, folders


def _categories(found: Iterable[str | None], names: Sequence[str] | None) -> dict[str, int]:
    """The id of each name."""
    known = {name for name in found if name}
    if names is None:
        chosen = list(CLASSES) if known <= set(CLASSES) else sorted(known)
    else:
        chosen = [*names, *sorted(known - set(names))]
    return {name: number for number, name in enumerate(chosen, start=1)}


Parsed = tuple[dict[str, Any], list[dict[str, Any]]]


def _parse(folder: Path, stem: str) -> Parsed:
    """What one file says of its image, and of its objects with their `name`s."""
    where = f"{folder.name}/{stem}.xml"
    try:
        root = ElementTree.parse(folder / f"{stem}.xml").getroot()
    except FileNotFoundError:
        return {"where": f"{where}: no such file"}, []
    except (OSError, ElementTree.ParseError, ValueError, LookupError) as error:
        return {"where": f"{where}: cannot be read as XML ({error})"}, []
    width, height = (_number(root.findtext(f"size/{side}")) for side in ("width", "height"))
    image: dict[str, Any] = {"where": where}
    if name := _text(root, "filename"):
        image["filename"] = name.replace("\\", "/").rpartition("/")[2]
    if width >= 1 and height >= 1:
        image |= {"width": int(width), "height": int(height)}
    else:
        image |= {"where": f"{where}: no <size> with a width and a height, and no image file", "unsized": True}
    objects = [_object(node, f"{where}, object {i}") for i, node in enumerate(root.iterfind("object"), start=1)]
    return image, objects


def _object(node: ElementTree.Element, where: str) -> dict[str, Any]:
    corners = [_number(node.findtext(f"bndbox/{corner}")) for corner in _CORNERS]
    name, wrong = _text(node, "name"), [c for c, v in zip(_CORNERS, corners, strict=True) if math.isnan(v)]
    x0, y0, x1, y1 = corners
    faults = ([] if name else ["no <name>"]) + ([f"no number as {', '.join(wrong)} in <bndbox>"] if wrong else [])
    flags = {key: int(_number(node.findtext(tag)) == 1) for tag, key in FLAGS.items() if node.find(tag) is not None}
    return {
        "name": name or None,
        "bbox": None if wrong else [x0 - 1, y0 - 1, x1 - x0 + 1, y1 - y0 + 1],
        **flags,
        "where": f"{where}: {', '.join(faults)}" if faults else where,
    }


def _text(node: ElementTree.Element, tag: str) -> str:
    return (node.findtext(tag) or "").strip()


def _number(text: str | None) -> float:
    """The number that a text holds; NaN if it is none that can be used."""
    try:
        value = float(text or "nan")
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan
