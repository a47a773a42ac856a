"""What can be wrong with a data set: the kinds, how grave they are, and what was found."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Box = tuple[float, float, float, float]
Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


@dataclass(frozen=True)
class Kind:
    """error: training stops, or learns or measures something wrong. mend: what `fix=true` does about it.

    masks: an error only where masks are read, else a warning.
    """

    severity: Severity
    advice: str
    mend: str = ""
    masks: bool = False


_DROP = "removed"
KINDS: dict[str, Kind] = {
    # The file as a whole
    "unusable annotation file": Kind("error", "give a COCO instances file that exists and is complete"),
    "no image folder": Kind("error", "check the paths under `data`"),
    "no images": Kind("error", "list the images under `images`"),
    "no objects": Kind("error", "training needs boxes: check data.classes and `annotations`"),
    "unknown class in data.classes": Kind("error", "name classes as the file spells them"),
    "fewer images than one step takes": Kind("error", "lower data.batch_size"),
    "split not given": Kind("warning", "training needs it; checked without"),
    "one file for both splits": Kind("warning", "evaluate on images that are not trained on"),
    # Categories
    "bad category record": Kind("error", "each category needs an integer `id` and a `name`"),
    "duplicate category id": Kind("error", "give each category its own id", "removed where both are the same"),
    "duplicate category name": Kind("error", "give each category its own name, or merge the two"),
    "category names that are nearly the same": Kind("warning", "merge them if they mean the same"),
    "category that a split lacks": Kind("error", "use matching files, or name the common classes in data.classes"),
    "category with another id in the other split": Kind("note", "classes are matched by name; nothing to do"),
    "unused category": Kind("note", "remove it, or leave it out with data.classes, if it never gets objects"),
    "class to evaluate without training objects": Kind("warning", "it can never be found: add training objects"),
    # Image records and files
    "bad image record": Kind(
        "error", "each image needs integer `id`, `width` and `height` above 0, and a `file_name`", _DROP
    ),
    "duplicate image id": Kind("error", "give each image its own id", "removed, but for one of the same file"),
    "image file listed twice": Kind("warning", "keep one record of each file"),
    "missing image file": Kind("error", "put the file there, or remove the image from the annotations", _DROP),
    "empty image file": Kind("error", "restore the file from its source", _DROP),
    "unreadable image file": Kind("error", "restore the file from its source", _DROP),
    "image of another size": Kind("error", "correct `width` and `height`, or the file", _DROP),
    "turned by EXIF": Kind("note", "read so that its size is that of the record; look whether its boxes fit"),
    "file of another type than its name says": Kind("note", "rename it; it is read by its content"),
    "unusual pixels": Kind("note", "converted to 8-bit RGB for training"),
    "moving picture": Kind("warning", "only its first frame is read"),
    "very small image": Kind("warning", "nothing can be found in it"),
    "image outside its folder": Kind("note", "file_name should be relative to the image folder"),
    "same image twice": Kind("warning", "keep one; check that both have the same objects"),
    "same image in train and val": Kind("error", "remove it from one: it makes the validation too good", "kept in val"),
    "image without objects": Kind("note", "trained as background; remove it if objects were forgotten"),
    "image list with an unknown category": Kind("warning", "list ids of `categories`"),
    "object of a category that its image excludes": Kind("warning", "its `neg_category_ids` say that there is none"),
    "file that no record names": Kind("note", "add it to the annotations, or remove it"),
    # Annotation records
    "annotation without id": Kind("warning", "give each annotation its own integer id"),
    "duplicate annotation id": Kind("error", "give each annotation its own id", "the first is kept"),
    "annotation of an unknown image": Kind("error", "add the image or remove the annotation", _DROP),
    "unknown category id": Kind("error", "add the category or remove the annotation", _DROP),
    "flag that is not 0 or 1": Kind("error", "`iscrowd` and `ignore` are 0 for an ordinary object", _DROP),
    "area that is not a number above 0": Kind("error", "write the object's area in pixels", "the box's area"),
    "area larger than the box": Kind("note", "decides between small, medium and large in COCO's evaluation"),
    # Boxes
    "box that is not 4 finite numbers": Kind("error", "write `bbox` as [x, y, width, height] in pixels", _DROP),
    "inverted box": Kind("error", "`bbox` is [x, y, width, height]; width and height must be above 0", _DROP),
    "box without area": Kind("error", "`bbox` is [x, y, width, height]; width and height must be above 0", _DROP),
    "box outside its image": Kind("error", "check the box, and the image's width and height", _DROP),
    "box that reaches out of its image": Kind("warning", "clipped for training; check the box", "clipped"),
    "box less than a pixel out of its image": Kind("note", "clipped for training", "clipped"),
    "box smaller than a pixel": Kind("warning", "too small to see; remove it"),
    "box as large as its image": Kind("note", "right if the object fills the picture"),
    "very long box": Kind("note", "one side is more than 20 times the other; check it"),
    "same box twice": Kind("warning", "remove one of the two"),
    "same box with two categories": Kind("warning", "decide for one, unless both are meant"),
    "boxes that look like corners": Kind("error", "`bbox` is [x, y, width, height], not [x1, y1, x2, y2]"),
    "boxes that look like fractions": Kind("error", "bbox is in pixels, not in fractions of the image"),
    # Masks
    "object without a usable mask": Kind(
        "error",
        "mend its `segmentation`, or leave masks out: data.masks=false",
        "removed where masks are read",
        True,
    ),
    "mask without area": Kind("error", "draw it again", "removed where masks are read", True),
    "mask that disagrees with its box": Kind("warning", "make both of the same object"),
}


@dataclass(frozen=True)
class Picture:
    """What to show of a finding: an image file, and boxes (x0, y0, x1, y1) in its pixels, if there are any.

    other: what `box` is compared with.
    """

    path: Path
    box: Box | None = None
    other: Box | None = None


@dataclass(frozen=True)
class Example:
    """record: which one, and what is wrong with it."""

    record: str
    picture: Picture | None = None


@dataclass
class Repair:
    """What `fix=true` would do to one file: positions in its lists to remove, and keys of annotations to set."""

    images: set[int] = field(default_factory=set)
    categories: set[int] = field(default_factory=set)
    annotations: set[int] = field(default_factory=set)
    changes: dict[int, dict[str, Any]] = field(default_factory=dict)


@dataclass
class Findings:
    """What was found in one file. Of each kind the first `limit` are kept as examples, all are counted.

    masks: whether the masks of this file are read. unmended: of each kind, how many `fix=true` leaves as they are.
    """

    source: Path
    limit: int
    masks: bool
    counts: Counter[str] = field(default_factory=Counter)
    unmended: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[Example]] = field(default_factory=dict)

    def add(self, kind: str, record: str, picture: Picture | None = None, mended: bool = False) -> None:
        self.counts[kind] += 1
        self.unmended[kind] += not mended
        shown = self.examples.setdefault(kind, [])
        if len(shown) < self.limit:
            shown.append(Example(record, picture))

    def severity(self, kind: str) -> Severity:
        return "warning" if KINDS[kind].masks and not self.masks else KINDS[kind].severity

    def kinds(self) -> list[str]:
        """What was found, the gravest first."""
        order = list(KINDS)
        return sorted(self.counts, key=lambda k: (SEVERITIES.index(self.severity(k)), order.index(k)))

    def total(self, severity: Severity) -> int:
        return sum(n for kind, n in self.counts.items() if self.severity(kind) == severity)

    def left(self, severity: Severity) -> int:
        """How many of a severity `fix=true` cannot mend."""
        return sum(n for kind, n in self.unmended.items() if self.severity(kind) == severity)
