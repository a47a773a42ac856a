"""Annotations into files of COCO, Pascal VOC and YOLO; `codetr.data.readers` says what is in them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from xml.etree import ElementTree

import yaml

from codetr.data.readers.voc import FLAGS

Record = dict[str, Any]


@dataclass
class Split:
    """Good records in the words of COCO (see `codetr.data.readers`), and how their image files are named from now on.

    root: the folder that `file_name` of an image is relative to.
    names: image id -> name in the folder of images.
    """

    root: Path
    categories: list[Record]
    images: list[Record]
    annotations: list[Record]
    names: Mapping[int, str]

    def by_image(self) -> Iterator[tuple[Record, list[Record]]]:
        """Every image with its objects."""
        objects: dict[int, list[Record]] = {i["id"]: [] for i in self.images}
        for record in self.annotations:
            objects[record["image_id"]].append(record)
        return ((i, objects[i["id"]]) for i in self.images)


Writer = Callable[[Path, Mapping[str, Split]], Counter[str]]
"""Writes the annotations of splits below a folder; counts, by kind, what the format has no place for."""


def write_coco(target: Path, splits: Mapping[str, Split]) -> Counter[str]:
    """annotations/instances_{split}.json, for images in a folder per split. Ids of annotations count through."""
    (target / "annotations").mkdir()
    number = 0
    for name, split in splits.items():
        annotations = []
        for record in split.annotations:
            number += 1
            width, height = record["bbox"][2:]
            default = {"id": number, "iscrowd": 0, "area": width * height}
            annotations.append(default | {k: v for k, v in record.items() if k not in ("where", "id")})
        images = [_without_place(i) | {"file_name": split.names[i["id"]]} for i in split.images]
        document = {"images": images, "annotations": annotations, "categories": split.categories}
        (target / "annotations" / f"instances_{name}.json").write_text(json.dumps(document))
    return Counter()


def write_voc(target: Path, splits: Mapping[str, Split]) -> Counter[str]:
    """Annotations/*.xml and ImageSets/Main/{split}.txt, for images in JPEGImages.

    Coordinates are whole numbers only where those are exact. An ignored object is `difficult`; a crowd has `iscrowd`.
    """
    lists = target / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    lost: Counter[str] = Counter()
    for name, split in splits.items():
        classes = {c["id"]: c["name"] for c in split.categories}
        stems = []
        for image, objects in split.by_image():
            file = PurePosixPath(split.names[image["id"]])
            stems.append(file.with_suffix("").as_posix())
            path = target / "Annotations" / file.with_suffix(".xml")
            path.parent.mkdir(parents=True, exist_ok=True)
            voc_xml(file.name, image, objects, classes).write(path, encoding="utf-8")
            lost["masks"] += sum(bool(o.get("segmentation")) for o in objects)
        (lists / f"{name}.txt").write_text("".join(f"{stem}\n" for stem in stems), encoding="utf-8")
    return lost


def write_yolo(target: Path, splits: Mapping[str, Split]) -> Counter[str]:
    """data.yaml and labels/{split}/*.txt, for images in images/{split}. Classes are numbered as in the first split.

    Boxes are clipped to their images: other readers refuse coordinates that are not in [0, 1].
    """
    classes = list(dict.fromkeys(c["name"] for split in splits.values() for c in split.categories))
    lost: Counter[str] = Counter()
    for name, split in splits.items():
        labels = {c["id"]: classes.index(c["name"]) for c in split.categories}
        for image, objects in split.by_image():
            path = target / "labels" / name / PurePosixPath(split.names[image["id"]]).with_suffix(".txt")
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = [o for o in objects if not o.get("iscrowd") and not o.get("ignore")]
            path.write_text("".join(f"{labels[o['category_id']]} {yolo_box(o['bbox'], image)}\n" for o in kept))
            lost["crowds and ignored objects"] += len(objects) - len(kept)
            lost["masks"] += sum(bool(o.get("segmentation")) for o in kept)
    settings = {"path": ".", **{name: f"images/{name}" for name in splits}, "names": dict(enumerate(classes))}
    (target / "data.yaml").write_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return lost


def _without_place(record: Record) -> Record:
    return {k: v for k, v in record.items() if k != "where"}


def voc_xml(file: str, image: Record, objects: Sequence[Record], classes: Mapping[int, str]) -> ElementTree.ElementTree:
    """file: name of the image. image: `height` and `width`. objects: `bbox` and `category_id`. classes: name by id."""
    root = ElementTree.Element("annotation")
    _add(root, filename=file)
    _add(ElementTree.SubElement(root, "size"), width=image["width"], height=image["height"], depth=3)
    for record in objects:
        node = ElementTree.SubElement(root, "object")
        _add(node, name=classes[record["category_id"]])
        _add(node, **{tag: int(record[key]) for tag, key in FLAGS.items() if key in record})
        x, y, w, h = record["bbox"]
        box = ElementTree.SubElement(node, "bndbox")
        _add(box, xmin=_short(x + 1), ymin=_short(y + 1), xmax=_short(x + w), ymax=_short(y + h))
    ElementTree.indent(root)
    return ElementTree.ElementTree(root)


def _add(node: ElementTree.Element, **values: Any) -> None:
    for tag, value in values.items():
        ElementTree.SubElement(node, tag).text = str(value)


def _short(value: float) -> int | float:
    return int(value) if float(value).is_integer() else value


def yolo_box(bbox: list[float], image: Record) -> str:
    """A box [x, y, width, height] as text, with digits enough to read the same numbers back."""
    x, y, w, h = bbox
    left, right = (min(max(v, 0), image["width"]) / image["width"] for v in (x, x + w))
    top, bottom = (min(max(v, 0), image["height"]) / image["height"] for v in (y, y + h))
    return " ".join(map(repr, ((left + right) / 2, (top + bottom) / 2, right - left, bottom - top)))
