"""The rules that a data set keeps, how grave it is to break one, and what to do about it.

Training, conversion and the check of a data set ask here: a record that one of them refuses is refused by all.
`codetr.data.judge` says which record breaks which rule.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


@dataclass(frozen=True)
class Rule:
    """severity: an "error" stops training, or costs it the record; a "warning" is probably not meant; a "note" is good
    to know.

    advice: what to do about it.
    mend: what `fix=true` does about it; where the rule is no error, training reads the record in the same way.
    masks: an error only where masks are read, else a warning.
    whole: of the file, so that no record can be left out.
    training: whether training sees it, too; it never compares the images of both splits.
    """

    severity: Severity
    advice: str
    mend: str = ""
    masks: bool = False
    whole: bool = False
    training: bool = True


_DROP = "removed"
RULES: dict[str, Rule] = {
    # The file as a whole
    "unusable annotation file": Rule("error", "give a COCO instances file that exists and is complete"),
    "no image folder": Rule("error", "check the paths under `data`"),
    "no images": Rule("error", "list the images under `images`"),
    "no objects": Rule("error", "training needs boxes: check data.classes and `annotations`"),
    "unknown class in data.classes": Rule("error", "name classes as the file spells them"),
    "fewer images than one step takes": Rule("error", "lower data.batch_size"),
    "split not given": Rule("warning", "training needs it; checked without"),
    "one file for both splits": Rule("warning", "evaluate on images that are not trained on"),
    # Categories
    "bad category record": Rule("error", "each category needs an integer `id` and a `name`"),
    "duplicate category id": Rule("error", "give each category its own id", "removed where both are the same"),
    "duplicate category name": Rule("error", "give each category its own name, or merge the two"),
    "category names that are nearly the same": Rule("warning", "merge them if they mean the same"),
    "category that training lacks": Rule("error", "spell it as in training, or name the classes in data.classes"),
    "category that a split lacks": Rule("note", "classes are those of the training file; nothing to do"),
    "root of the categories": Rule("note", "left out: it has no object and only holds the classes, as Roboflow writes"),
    "category with another id in the other split": Rule("note", "classes are matched by name; nothing to do"),
    "unused category": Rule("note", "remove it, or leave it out with data.classes, if it never gets objects"),
    "class to evaluate without training objects": Rule("warning", "it can never be found: add training objects"),
    # Image records and files
    "bad image record": Rule(
        "error", "each image needs integer `id`, `width` and `height` above 0, and a `file_name`", _DROP
    ),
    "duplicate image id": Rule("error", "give each image its own id", "removed, but for one of the same file"),
    "image file listed twice": Rule("warning", "keep one record of each file"),
    "image file of another spelling": Rule("warning", "found all the same; write its name as it is", "written so"),
    "missing image file": Rule("error", "put the file there, or remove the image from the annotations", _DROP),
    "empty image file": Rule("error", "restore the file from its source", _DROP),
    "unreadable image file": Rule("error", "restore the file from its source", _DROP),
    "image of another size": Rule("error", "correct `width` and `height`, or the file", _DROP),
    "turned by EXIF": Rule("note", "read so that its size is that of the record; look whether its boxes fit"),
    "file of another type than its name says": Rule("note", "rename it; it is read by its content"),
    "unusual pixels": Rule("note", "converted to 8-bit RGB for training"),
    "moving picture": Rule("warning", "only its first frame is read"),
    "very small image": Rule("warning", "nothing can be found in it"),
    "image outside its folder": Rule("note", "file_name should be relative to the image folder"),
    "same image twice": Rule("warning", "keep one; check that both have the same objects"),
    "same image in train and val": Rule(
        "error", "remove it from one: it makes the validation too good", "kept in val", training=False
    ),
    "image without objects": Rule("note", "trained as background; remove it if objects were forgotten"),
    "image list with an unknown category": Rule("warning", "list ids of `categories`"),
    "object of a category that its image excludes": Rule("warning", "its `neg_category_ids` say that there is none"),
    "file that no record names": Rule("note", "add it to the annotations, or remove it"),
    # Annotation records
    "annotation without id": Rule("warning", "give each annotation its own integer id"),
    "duplicate annotation id": Rule("error", "give each annotation its own id", "the first is kept"),
    "annotation of an unknown image": Rule("error", "add the image or remove the annotation", _DROP),
    "unknown category id": Rule("error", "add the category or remove the annotation", _DROP),
    "value of another type": Rule("warning", 'write numbers as numbers: 0, not "0"; 640, not 640.0', "written so"),
    "flag that is not 0 or 1": Rule("error", "`iscrowd` and `ignore` are 0 for an ordinary object", _DROP),
    "area that is not a number above 0": Rule(
        "warning", "write it in pixels; the box's area is taken", "the box's area"
    ),
    "area larger than the box": Rule("note", "decides between small, medium and large in COCO's evaluation"),
    # Boxes
    "box that is not 4 finite numbers": Rule("error", "write `bbox` as [x, y, width, height] in pixels", _DROP),
    "inverted box": Rule("error", "`bbox` is [x, y, width, height]; width and height must be above 0", _DROP),
    "box without area": Rule("error", "`bbox` is [x, y, width, height]; width and height must be above 0", _DROP),
    "box outside its image": Rule("error", "check the box, and the image's width and height", _DROP),
    "box that reaches out of its image": Rule("warning", "clipped for training; check the box", "clipped"),
    "box less than a pixel out of its image": Rule("note", "clipped for training", "clipped"),
    "box smaller than a pixel": Rule("warning", "too small to see; remove it"),
    "box as large as its image": Rule("note", "right if the object fills the picture"),
    "very long box": Rule("note", "one side is more than 20 times the other; check it"),
    "same box twice": Rule("warning", "remove one of the two"),
    "same box with two categories": Rule("warning", "decide for one, unless both are meant"),
    "boxes that look like corners": Rule("error", "`bbox` is [x, y, width, height], not [x1, y1, x2, y2]", whole=True),
    "boxes that look like fractions": Rule("error", "`bbox` is in pixels, not in fractions of the image", whole=True),
    "mostly crowds": Rule(
        "warning", "not trained on: `iscrowd` is 1 for groups alone; set it to 0 where a tool writes it for every mask"
    ),
    # Masks
    "object without a usable mask": Rule(
        "error",
        "mend its `segmentation`, or leave masks out: data.masks=false",
        "removed where masks are read",
        True,
    ),
    "mask without area": Rule(
        "warning", "trained as it is, without a pixel; draw it again", "removed where masks are read"
    ),
    "mask that disagrees with its box": Rule("warning", "make both of the same object"),
}

_MANY = 5  # boxes from which on a habit of the whole file can be told
_WHOLE = 0.99  # of the image's sides
_LONG = 20  # longer side to shorter side
BOX_RULES = (
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


def clip(boxes: np.ndarray, extent: np.ndarray) -> np.ndarray:
    """`boxes` [n, 4] xywh cut to images of `extent` [n, 2] (width, height)."""
    with np.errstate(over="ignore", invalid="ignore"):
        low, high = boxes[:, :2].clip(0, extent), (boxes[:, :2] + boxes[:, 2:]).clip(0, extent)
    return np.concatenate([low, high - low], 1)


def box_rules(boxes: np.ndarray, extent: np.ndarray) -> np.ndarray:
    """[n], the first of `BOX_RULES` that each of `boxes` ([n, 4] xywh in pixels) breaks, or -1.

    extent: [n, 2] (width, height) of their images.
    """
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

    boxes: those with four finite numbers.
    crowds: [categories].
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
        """boxes: [n, 4] xywh.
        extent: [n, 2] (width, height).
        category: [n] positions.
        crowd: [n] bool.
        """
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
