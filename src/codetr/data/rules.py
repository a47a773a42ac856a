"""One judge of records: the kinds of faults, how grave they are, and which values are which.

Training, `check` and `convert` ask here: a record that one of them refuses is refused by all.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


@dataclass(frozen=True)
class Kind:
    """error: training stops, or learns or measures something wrong. mend: what `fix=true` does about it.

    masks: an error only where masks are read, else a warning. whole: of the file, so that no record can be left out.
    """

    severity: Severity
    advice: str
    mend: str = ""
    masks: bool = False
    whole: bool = False


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
    "category that training lacks": Kind("error", "spell it as in training, or name the classes in data.classes"),
    "category that a split lacks": Kind("note", "classes are those of the training file; nothing to do"),
    "root of the categories": Kind("note", "left out: it has no object and only holds the classes, as Roboflow writes"),
    "category with another id in the other split": Kind("note", "classes are matched by name; nothing to do"),
    "unused category": Kind("note", "remove it, or leave it out with data.classes, if it never gets objects"),
    "class to evaluate without training objects": Kind("warning", "it can never be found: add training objects"),
    # Image records and files
    "bad image record": Kind(
        "error", "each image needs integer `id`, `width` and `height` above 0, and a `file_name`", _DROP
    ),
    "duplicate image id": Kind("error", "give each image its own id", "removed, but for one of the same file"),
    "image file listed twice": Kind("warning", "keep one record of each file"),
    "image file of another spelling": Kind("warning", "found all the same; write its name as it is", "written so"),
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
    "value of another type": Kind("warning", 'write numbers as numbers: 0, not "0"; 640, not 640.0', "written so"),
    "flag that is not 0 or 1": Kind("error", "`iscrowd` and `ignore` are 0 for an ordinary object", _DROP),
    "area that is not a number above 0": Kind(
        "warning", "write it in pixels; the box's area is taken", "the box's area"
    ),
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
    "boxes that look like corners": Kind("error", "`bbox` is [x, y, width, height], not [x1, y1, x2, y2]", whole=True),
    "boxes that look like fractions": Kind("error", "`bbox` is in pixels, not in fractions of the image", whole=True),
    "mostly crowds": Kind(
        "warning", "not trained on: `iscrowd` is 1 for groups alone; set it to 0 where a tool writes it for every mask"
    ),
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

_MANY = 5  # boxes from which on a habit of the whole file can be told
_WHOLE = 0.99  # of the image's sides
_LONG = 20  # longer side to shorter side
BOX_KINDS = (
    "box that is not 4 finite numbers",
    "inverted box",
    "box without area",
    "box outside its image",
    "box that reaches out of its image",
    "box less than a pixel out of its image",
    "box smaller than a pixel",
    "box as large as its image",
    "very long box",
)
REFUSED_BOXES = sum(KINDS[kind].severity == "error" for kind in BOX_KINDS)  # they come first


def clip(boxes: np.ndarray, extent: np.ndarray) -> np.ndarray:
    """`boxes` [n, 4] xywh cut to images of `extent` [n, 2] (width, height)."""
    with np.errstate(over="ignore", invalid="ignore"):
        low, high = boxes[:, :2].clip(0, extent), (boxes[:, :2] + boxes[:, 2:]).clip(0, extent)
    return np.concatenate([low, high - low], 1)


def box_kinds(boxes: np.ndarray, extent: np.ndarray) -> np.ndarray:
    """[n], the gravest of `BOX_KINDS` of each of `boxes` ([n, 4] xywh in pixels), or -1; those below `REFUSED_BOXES`
    are errors. extent: [n, 2] (width, height) of their images."""
    low, side = boxes[:, :2], boxes[:, 2:]
    with np.errstate(over="ignore", invalid="ignore"):
        high = low + side
        overhang = np.maximum(-low, high - extent).max(1)
        visible = clip(boxes, extent)[:, 2:]
        hits = [
            ~np.isfinite(boxes).all(1),
            (side < 0).any(1),
            (side == 0).any(1),
            ((low >= extent) | (high <= 0)).any(1),
            overhang > 1,
            overhang > 1e-3,
            (visible < 1).any(1),
            (visible >= _WHOLE * extent).all(1),
            side.max(1) > _LONG * np.maximum(side.min(1), 1e-9),
        ]
    return np.select(hits, np.arange(len(hits)), -1)


@dataclass
class Habits:
    """Counts over all objects of a file, from which it shows when all its boxes are written otherwise than COCO's.

    boxes: those with four finite numbers. crowds: [categories].
    """

    categories: int
    boxes: int = 0
    fractions: int = 0
    reach_out: int = 0
    corners: int = 0
    objects: np.ndarray = field(init=False)
    crowds: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.objects, self.crowds = np.zeros((2, self.categories), np.int64)

    def count(self, boxes: np.ndarray, extent: np.ndarray, category: np.ndarray, crowd: np.ndarray) -> None:
        """boxes: [n, 4] xywh; extent: [n, 2] (width, height); category: [n] positions; crowd: [n] bool."""
        finite = np.isfinite(boxes).all(1)
        boxes, extent = boxes[finite], extent[finite]
        self.boxes += len(boxes)
        self.fractions += int((np.abs(boxes) <= 1.01).all(1).sum())
        with np.errstate(over="ignore"):
            self.reach_out += int((boxes[:, :2] + boxes[:, 2:] > extent + 1).any(1).sum())
        self.corners += int(((boxes[:, 2:] > boxes[:, :2]) & (boxes[:, 2:] <= extent + 1)).all(1).sum())
        self.objects += np.bincount(category, minlength=self.categories)
        self.crowds += np.bincount(category[crowd], minlength=self.categories)

    def found(self, names: list[str]) -> dict[str, str]:
        """Kind -> what speaks for it. names: of the categories."""
        kinds = {}
        if self.boxes >= _MANY and self.fractions == self.boxes:
            kinds["boxes that look like fractions"] = f"all {self.boxes} boxes lie between 0 and 1"
        elif self.boxes >= _MANY and self.reach_out > 0.2 * self.boxes and self.corners > 0.95 * self.boxes:
            kinds["boxes that look like corners"] = (
                f"{self.reach_out / self.boxes:.0%} of {self.boxes} boxes reach out of their image, and "
                f"{self.corners / self.boxes:.0%} would not as corners"
            )
        most = (self.objects >= _MANY) & (2 * self.crowds > self.objects)
        if most.any():
            kinds["mostly crowds"] = ", ".join(
                f"{self.crowds[i]} of {self.objects[i]} objects of {names[i]}" for i in most.nonzero()[0].tolist()
            )
        return kinds
