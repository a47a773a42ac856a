"""One split of a data set as it is written, nothing dropped, with what was found in it so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from codetr.data.findings import Box, Findings, Picture
from codetr.data.judge import Record
from codetr.inspection.files import File


@dataclass
class Repair:
    """What `fix=true` would do to one file: positions in its lists to remove, and keys of its records to set."""

    images: set[int] = field(default_factory=set)
    categories: set[int] = field(default_factory=set)
    annotations: set[int] = field(default_factory=set)
    changes: dict[int, Record] = field(default_factory=dict)
    image_changes: dict[int, Record] = field(default_factory=dict)


@dataclass
class Split:
    """Records in the words of COCO; files: what is known of the image of each record, None for records without.

    name: "train" or "val". root: the folder of the images. usable: image id -> position of its first good record.
    boxes: position of an annotation -> (x, y, width, height), of those that have four finite numbers.
    """

    name: str
    root: Path
    findings: Findings
    categories: list[Record] = field(default_factory=list)
    images: list[Record] = field(default_factory=list)
    annotations: list[Record] = field(default_factory=list)
    repair: Repair = field(default_factory=Repair)
    files: list[File | None] = field(default_factory=list)
    usable: dict[int, int] = field(default_factory=dict)
    boxes: dict[int, Box] = field(default_factory=dict)

    def add(self, rule: str, record: str, picture: Picture | None = None) -> None:
        """A finding that `fix=true` leaves as it is."""
        self.findings.add(rule, record, picture)

    def drop_image(self, position: int, rule: str, record: str, picture: Picture | None = None) -> None:
        self.repair.images.add(position)
        self.findings.add(rule, record, picture, mended=True)

    def drop_annotation(self, position: int, rule: str, record: str) -> None:
        self.repair.annotations.add(position)
        self.findings.add(rule, record, self.picture(position), mended=True)

    def change(self, position: int, rule: str, record: str, **values: Any) -> None:
        self.repair.changes.setdefault(position, {}).update(values)
        self.findings.add(rule, record, self.picture(position), mended=True)

    def change_image(self, position: int, rule: str, record: str, **values: Any) -> None:
        self.images[position] = self.images[position] | values
        self.repair.image_changes.setdefault(position, {}).update(values)
        self.findings.add(rule, record, mended=True)

    def image_name(self, position: int) -> str:
        record = self.images[position]
        file = record.get("file_name")
        where = f", {record['where']}" if "where" in record else ""
        return f"image {record.get('id', f'number {position}')}{f' ({file})' if file else ''}{where}"

    def annotation_name(self, position: int) -> str:
        """By its id and its image, or by the place that the reader knows."""
        record = self.annotations[position]
        if "where" in record:
            return str(record["where"])
        name = f"annotation {record.get('id', f'number {position}')}"
        image = self.image_of(position)
        return name if image is None else f"{name} of {self.image_name(image)}"

    def is_object(self, position: int) -> bool:
        """Whether an annotation is one to train on: with a box, no crowd, not to be ignored, not removed by a fix."""
        record = self.annotations[position]
        counts = not record.get("iscrowd") and not record.get("ignore")
        return counts and position in self.boxes and position not in self.repair.annotations

    def image_of(self, position: int) -> int | None:
        """The position of the image record of an annotation."""
        key = self.annotations[position].get("image_id")
        return self.usable.get(key) if type(key) is int else None

    def size(self, image: int) -> tuple[int, int]:
        """(width, height)"""
        return self.images[image]["width"], self.images[image]["height"]

    def picture(self, position: int) -> Picture | None:
        """Of an annotation, where its image can be shown."""
        image = self.image_of(position)
        if image is None or image in self.repair.images:
            return None
        path = self.root / self.images[image]["file_name"]
        if position not in self.boxes:
            return Picture(path)
        x, y, w, h = self.boxes[position]
        return Picture(path, (x, y, x + w, y + h))
