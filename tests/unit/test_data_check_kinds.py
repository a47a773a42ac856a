"""Bad input of every kind, planted one by one into a small data set without a fault: `check` finds it and names file
and record, `fix=true` mends it or says that it cannot, and training stops with a named error or counts what it skips.
"""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from coco_files import CATEGORIES, write_image
from hydra.utils import instantiate
from omegaconf import DictConfig
from PIL import Image

from codetr import application
from codetr.data.commands.check import inspect
from codetr.data.rules import RULES
from codetr.errors import UserError
from codetr.inspection.clean import targets, write_clean
from codetr.inspection.split import Split

WIDTH, HEIGHT = 60, 50
NAN = float("nan")
Json = dict[str, Any]


@dataclass
class Planted:
    """A data set on disk whose documents are still to be written; `text` replaces the training document."""

    folder: Path
    train: Json
    val: Json
    text: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def image(self) -> Json:
        return self.train["images"][1]

    @property
    def annotation(self) -> Json:
        return self.train["annotations"][2]

    @property
    def file(self) -> Path:
        return self.folder / "train" / "001.jpg"


def document(count: int, first: int) -> Json:
    """`count` images with two objects each: ids first, first + 3, ... and 1, 2, ...; boxes, polygons and areas fit."""
    boxes = [[5, 6, 20, 10], [30, 20, 12, 16]]
    images = [
        {"id": first + 3 * i, "file_name": f"{i:03}.jpg", "width": WIDTH, "height": HEIGHT, "license": 1}
        for i in range(count)
    ]
    annotations = []
    for n in range(2 * count):
        x, y, w, h = boxes[n % 2]
        polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
        annotations.append(
            {
                "id": n + 1,
                "image_id": first + 3 * (n // 2),
                "category_id": CATEGORIES[n % 3]["id"],
                "bbox": [x, y, w, h],
                "area": w * h,
                "iscrowd": 0,
                "segmentation": [polygon],
                "note": "kept",
            }
        )
    categories = [dict(c) for c in CATEGORIES]
    return {"info": {"year": 2026}, "images": images, "annotations": annotations, "categories": categories}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for name, count in (("train", 4), ("val", 3)):
        for i in range(count):
            write_image(folder / name / f"{i:03}.jpg", WIDTH, HEIGHT, seed=10 * (name == "val") + i)
    return folder


@pytest.fixture
def planted(pictures: Path, tmp_path: Path) -> Planted:
    shutil.copytree(pictures, tmp_path, dirs_exist_ok=True)
    return Planted(tmp_path, document(4, first=100), document(3, first=500))


@pytest.fixture(scope="module")
def composed() -> DictConfig:
    paths = [f"data.{s}_{k}" for s in ("train", "val") for k in ("images", "annotations")]
    names = ["train", "train.json", "val", "val.json"]
    return application.compose("check", ["data=custom", *(f"{k}={n}" for k, n in zip(paths, names, strict=True))])


def written(planted: Planted, composed: DictConfig, **settings: Any) -> DictConfig:
    """The configuration of the data set, after its documents are written."""
    (planted.folder / "train.json").write_text(planted.text or json.dumps(planted.train))
    (planted.folder / "val.json").write_text(json.dumps(planted.val))
    config = composed.copy()
    config.data = {**config.data, "root": str(planted.folder), "masks": True, **planted.settings, **settings}
    return config


def annotation(**values: Any) -> Callable[[Planted], None]:
    return lambda p: p.annotation.update(values)


def image(**values: Any) -> Callable[[Planted], None]:
    return lambda p: p.image.update(values)


def category(**values: Any) -> Callable[[Planted], None]:
    return lambda p: p.train["categories"][1].update(values)


def document_text(change: Callable[[str], str]) -> Callable[[Planted], None]:
    def plant(planted: Planted) -> None:
        planted.text = change(json.dumps(planted.train))

    return plant


def content(change: Callable[[bytes], bytes]) -> Callable[[Planted], None]:
    """Change the bytes of an image file."""
    return lambda p: p.file.write_bytes(change(p.file.read_bytes()))


def saved(**options: Any) -> Callable[[Planted], None]:
    """Write the image anew, with options of Pillow and `mode`, `size`, `orientation`."""

    def plant(planted: Planted) -> None:
        keys = {k: options.get(k) for k in ("mode", "size", "orientation")}
        with Image.open(planted.file) as opened:
            picture = opened.convert(keys["mode"] or "RGB").resize(keys["size"] or opened.size)
        exif = Image.Exif()
        if keys["orientation"]:
            exif[0x0112] = keys["orientation"]
        extra = {k: v for k, v in options.items() if k not in keys}
        picture.save(planted.file, **{"format": "JPEG", "exif": exif} | extra)

    return plant


def each(change: Callable[[Json], Any]) -> Callable[[Planted], None]:
    """Change every training annotation."""

    def plant(planted: Planted) -> None:
        for record in planted.train["annotations"]:
            change(record)

    return plant


def forget(where: Literal["image", "annotation"], key: str) -> Callable[[Planted], None]:
    return lambda p: getattr(p, where).pop(key)


def add_annotation(**values: Any) -> Callable[[Planted], None]:
    return lambda p: p.train["annotations"].append({**p.annotation, "id": 77, **values})


def add_image(name: str, **values: Any) -> Callable[[Planted], None]:
    def plant(planted: Planted) -> None:
        shutil.copy(planted.file, planted.file.with_name(name))
        planted.train["images"].append({**planted.image, "id": 170, "file_name": name, **values})
        planted.train["annotations"].append({**planted.annotation, "id": 71, "image_id": 170})

    return plant


def moved(name: str) -> Callable[[Planted], None]:
    return lambda p: p.file.rename(p.file.parent / name) and None  # type: ignore[func-returns-value]


def into_a_folder(planted: Planted) -> None:
    planted.file.unlink()
    planted.file.mkdir()


def moving_picture(planted: Planted) -> None:
    with Image.open(planted.file) as picture:
        frames = [picture.convert("P"), picture.transpose(Image.Transpose.ROTATE_180).convert("P")]
    planted.image["file_name"] = "001.gif"
    frames[0].save(planted.file.with_suffix(".gif"), save_all=True, append_images=frames[1:])
    planted.file.unlink()


def small_picture(planted: Planted) -> None:
    write_image(planted.file, 31, 31)
    planted.image.update(width=31, height=31)
    planted.train["annotations"] = [a for a in planted.train["annotations"] if a["id"] != 4]


def outside(planted: Planted) -> None:
    planted.file.rename(planted.folder / "001.jpg")
    planted.image["file_name"] = "../001.jpg"


def in_both(planted: Planted) -> None:
    shutil.copy(planted.file, planted.folder / "val" / "002.jpg")


def without_objects(planted: Planted) -> None:
    planted.train["annotations"] = [a for a in planted.train["annotations"] if a["image_id"] != 103]


def only_crowds(planted: Planted) -> None:
    for record in planted.train["annotations"]:
        record["iscrowd"] = 1


def mostly_crowds(planted: Planted) -> None:
    """As CVAT and others write every mask of run lengths."""
    for record in planted.train["annotations"][:6]:
        record.update(category_id=7, iscrowd=1)


def extra_category(split: str, name: str = "blob") -> Callable[[Planted], None]:
    def plant(planted: Planted) -> None:
        getattr(planted, split)["categories"].append({"id": 90, "name": name})

    return plant


def objects_of_another(planted: Planted) -> None:
    extra_category("val")(planted)
    planted.val["annotations"][0]["category_id"] = 90


def root(name: str) -> Callable[[Planted], None]:
    """As Roboflow writes its categories, in both files."""

    def plant(planted: Planted) -> None:
        for doc in (planted.train, planted.val):
            doc["categories"] = [dict(c, supercategory=name) for c in doc["categories"]]
            doc["categories"].insert(0, {"id": 0, "name": name, "supercategory": "none"})

    return plant


def other_id(planted: Planted) -> None:
    planted.val["categories"][1]["id"] = 33
    for record in planted.val["annotations"]:
        record["category_id"] = {3: 33}.get(record["category_id"], record["category_id"])


def only_in_val(planted: Planted) -> None:
    planted.train["annotations"] = [a for a in planted.train["annotations"] if a["category_id"] != 12]


def repeated_image(planted: Planted) -> None:
    planted.train["images"].append(dict(planted.image))


def listed_twice(planted: Planted) -> None:
    planted.train["images"].append({**planted.image, "id": 170})
    planted.train["annotations"].append({**planted.annotation, "id": 71, "image_id": 170})


def runs(**values: Any) -> Callable[[Planted], None]:
    """A mask of run lengths over the box of the annotation, with changes."""
    x, y, w, h = 5, 6, 20, 10
    counts, gap = [x * HEIGHT + y], HEIGHT - h
    for _ in range(w):
        counts += [h, gap]
    counts[-1] = HEIGHT * WIDTH - sum(counts[:-1])
    return annotation(segmentation={"size": [HEIGHT, WIDTH], "counts": counts, **values})


def set_split(**values: Any) -> Callable[[Planted], None]:
    return lambda p: p.settings.update(values)


@dataclass(frozen=True)
class Case:
    """plant puts the fault; record: what the finding of that kind says (a pattern).

    training: "drops" it (with on_error=stop it stops and names the record; else it counts it), "stops" either way, or
    "reads" it all the same. count: findings of that kind. lost: records that training counts as bad.
    removed: images that `fix=true` may touch.
    """

    plant: Callable[[Planted], Any]
    kind: str
    record: str
    training: Literal["drops", "stops", "reads"]
    split: Literal["train", "val"] = "train"
    count: int = 1
    lost: int = 1
    removed: tuple[int, ...] = (103,)


A, I = r"annotation 3 of image 103 \(001\.jpg\)", r"image 103 \(001\.jpg\)"  # noqa: E741
NOT_FOUR = "box that is not 4 finite numbers"
NO_MASK = "object without a usable mask"
BAD_IMAGE = "bad image record"
UNREADABLE = "unreadable image file"
NO_IMAGE = "annotation of an unknown image"
WRITTEN = "value of another type"
SPELLING = "image file of another spelling"
NO_FLAG = "flag that is not 0 or 1"
NO_FILE = "unusable annotation file"

CASES: dict[str, Case] = {
    # The file as a whole
    "no file": Case(set_split(train_annotations="no.json"), NO_FILE, r"no\.json does not exist", "stops"),
    "not JSON": Case(document_text(lambda t: "<annotation/>"), NO_FILE, r"train\.json is not JSON", "stops"),
    "cut off": Case(document_text(lambda t: t[: len(t) // 2]), NO_FILE, r"train\.json is not JSON", "stops"),
    "empty file": Case(document_text(lambda t: " "), NO_FILE, r"train\.json is not JSON", "stops"),
    "a list": Case(document_text(lambda t: "[]"), NO_FILE, r"train\.json is not a COCO instances file", "stops"),
    "no list of images": Case(lambda p: p.train.pop("images"), NO_FILE, "no list of objects under images", "stops"),
    "records that are texts": Case(
        lambda p: p.train.update(annotations=["a"]), NO_FILE, "no list of objects under annotations", "stops"
    ),
    "no image folder": Case(set_split(train_images="none"), "no image folder", "none is no folder", "stops"),
    "no images": Case(lambda p: p.train.update(images=[], annotations=[]), "no images", "`images` is empty", "stops"),
    "no objects": Case(lambda p: p.train.update(annotations=[]), "no objects", r"train\.json: none of", "stops"),
    "crowds only": Case(only_crowds, "no objects", r"train\.json: none of the classes", "stops"),
    "unknown class": Case(
        set_split(classes=["disc", "dics"]), "unknown class in data.classes", "dics, not among .*'disc'", "stops"
    ),
    # Categories
    "category without id": Case(
        lambda p: p.train["categories"][1].pop("id"), "bad category record", r"category number 1 \(square\)", "stops"
    ),
    "category id as text": Case(category(id="3"), "bad category record", r"category 3 \(square\): id '3'", "stops"),
    "category without name": Case(
        lambda p: p.train["categories"][1].pop("name"), "bad category record", "category 3 .*: name None", "stops"
    ),
    "repeated category id": Case(category(id=7), "duplicate category id", r"category 7 \(square\) after disc", "stops"),
    "repeated category name": Case(category(name="disc"), "duplicate category name", r"category 3 \(disc\)", "stops"),
    "nearly the same name": Case(
        extra_category("train", "Disc "),
        "category names that are nearly the same",
        r"category 90 \(Disc \) and disc",
        "reads",
    ),
    "val lacks a category": Case(
        extra_category("train"), "category that a split lacks", r"blob: .*val\.json has no", "reads", "val"
    ),
    "train lacks a category": Case(
        extra_category("val"), "category that a split lacks", r"blob: .*train\.json has no", "reads"
    ),
    "objects of a category that train lacks": Case(
        objects_of_another, "category that training lacks", r"blob: .*train\.json has no", "stops"
    ),
    "another id in val": Case(
        other_id, "category with another id in the other split", "square: 33 in val, 3 in train", "reads", "val"
    ),
    "class only in val": Case(
        only_in_val, "class to evaluate without training objects", "star: 2 objects in val", "reads", "val"
    ),
    "category without objects": Case(only_in_val, "unused category", r"category 12 \(star\) has no object", "reads"),
    "root of another name": Case(root("things"), "root of the categories", r"category 0 \(things\)", "reads"),
    "root of a class's name": Case(root("disc"), "root of the categories", r"category 0 \(disc\)", "reads"),
    # Image records
    "image without id": Case(
        forget("image", "id"), BAD_IMAGE, r"image number 1 \(001\.jpg\): has no id", "drops", lost=3
    ),
    "image id as text": Case(image(id="103"), WRITTEN, rf"{I}: id '103'", "reads"),
    "image id as a word": Case(image(id="a3"), BAD_IMAGE, r"image a3 \(001\.jpg\): id is 'a3'", "drops", lost=3),
    "width with a point": Case(image(width=60.0, height="50"), WRITTEN, rf"{I}: width 60\.0, height '50'", "reads"),
    "image without width": Case(forget("image", "width"), BAD_IMAGE, rf"{I}: has no width", "drops"),
    "width 0": Case(image(width=0), BAD_IMAGE, rf"{I}: width is 0", "drops"),
    "negative height": Case(image(height=-50), BAD_IMAGE, rf"{I}: height is -50", "drops"),
    "width with a fraction": Case(image(width=60.5), BAD_IMAGE, rf"{I}: width is 60\.5", "drops"),
    "image without file name": Case(forget("image", "file_name"), BAD_IMAGE, "image 103: has no file_name", "drops"),
    "file name that is no text": Case(image(file_name=1), BAD_IMAGE, "image 103 .*: file_name is 1", "drops"),
    "repeated image id": Case(repeated_image, "duplicate image id", rf"{I} has the id", "drops"),
    "image id of another file": Case(
        image(id=100), "duplicate image id", r"image 100 .* has the id of 000\.jpg", "drops", lost=3, removed=(100, 103)
    ),
    "file listed twice": Case(listed_twice, "image file listed twice", r"image 170 \(001\.jpg\)", "reads"),
    # Image files
    "missing file": Case(lambda p: p.file.unlink(), "missing image file", rf"{I}: .*001\.jpg does not exist", "drops"),
    "missing folder": Case(image(file_name="a/1.jpg"), "missing image file", r"no folder .*train/a", "drops"),
    "file name in capitals": Case(moved("001.JPG"), SPELLING, rf"{I} is 001\.JPG", "reads"),
    "file of another suffix": Case(moved("001.png"), "missing image file", rf"{I}: .* there is 001\.png", "drops"),
    "empty image": Case(content(lambda b: b""), "empty image file", rf"{I}: .*has 0 bytes", "drops"),
    "cut off image": Case(content(lambda b: b[:-300]), UNREADABLE, rf"{I}: .*cannot be decoded", "drops"),
    "text as image": Case(content(lambda b: b"<html>404</html>"), UNREADABLE, rf"{I}: .*is not an image", "drops"),
    "folder as image": Case(into_a_folder, UNREADABLE, rf"{I}: .*is a folder", "drops"),
    "other size": Case(
        image(width=61), "image of another size", rf"{I}: .*001\.jpg holds 60x50 pixels, not 61x50", "drops"
    ),
    "sides swapped": Case(
        image(width=HEIGHT, height=WIDTH), "image of another size", rf"{I}: .*width and height are swapped", "drops"
    ),
    "turned by EXIF": Case(saved(orientation=6), "turned by EXIF", rf"{I}: orientation 6", "reads"),
    "PNG called JPEG": Case(saved(format="PNG"), "file of another type than its name says", rf"{I}: is a PNG", "reads"),
    "CMYK": Case(saved(mode="CMYK"), "unusual pixels", rf"{I}: mode CMYK", "reads"),
    "moving picture": Case(moving_picture, "moving picture", r"image 103 \(001\.gif\): 2 frames", "reads"),
    "tiny picture": Case(small_picture, "very small image", rf"{I}: 31x31 pixels", "reads"),
    "outside the folder": Case(outside, "image outside its folder", r"image 103 \(\.\./001\.jpg\)", "reads"),
    "same image twice": Case(add_image("copy.jpg"), "same image twice", rf"image 170 \(copy\.jpg\) is {I}", "reads"),
    "same image in both": Case(
        in_both, "same image in train and val", rf"{I} is image 506 \(002\.jpg\) of val\.json", "reads"
    ),
    "image without objects": Case(without_objects, "image without objects", I, "reads"),
    "unnamed file": Case(
        lambda p: shutil.copy(p.folder / "val" / "000.jpg", p.file.with_name("new.jpg")),
        "file that no record names",
        r"train/new\.jpg",
        "reads",
    ),
    # What annotations refer to
    "annotation without id": Case(forget("annotation", "id"), "annotation without id", "annotation number 2 ", "reads"),
    "repeated annotation id": Case(annotation(id=1), "duplicate annotation id", "annotation 1 of image 103", "drops"),
    "unknown image": Case(annotation(image_id=5), NO_IMAGE, r"annotation 3 \(image 5\)", "drops"),
    "image id as text here": Case(annotation(image_id="103"), WRITTEN, rf"{A}: image_id '103'", "reads"),
    "image id as a word here": Case(annotation(image_id="a3"), NO_IMAGE, r"annotation 3 \(image 'a3'\)", "drops"),
    "image id as list": Case(annotation(image_id=[103]), NO_IMAGE, r"annotation 3 \(image \[103\]\)", "drops"),
    "no image id": Case(forget("annotation", "image_id"), NO_IMAGE, r"annotation 3 \(image None\)", "drops"),
    "unknown category": Case(annotation(category_id=5), "unknown category id", rf"{A} \(category 5\)", "drops"),
    "category id as text here": Case(annotation(category_id="12"), WRITTEN, rf"{A}: category_id '12'", "reads"),
    "category as a word here": Case(
        annotation(category_id="disc"), "unknown category id", rf"{A} \(category 'disc'\)", "drops"
    ),
    "no category id": Case(
        forget("annotation", "category_id"), "unknown category id", rf"{A} \(category None\)", "drops"
    ),
    "crowd as text": Case(annotation(iscrowd="0"), WRITTEN, rf"{A}: iscrowd '0'", "reads"),
    "crowd as a number above 1": Case(annotation(iscrowd=2), NO_FLAG, rf"{A}: iscrowd 2", "drops"),
    "ignore as a word": Case(annotation(ignore="no"), NO_FLAG, rf"{A}: ignore 'no'", "drops"),
    "box of texts": Case(annotation(bbox=["5", "6", "20", "10.0"]), WRITTEN, rf"{A}: bbox \['5', '6'", "reads"),
    "area in text": Case(annotation(area="200"), WRITTEN, rf"{A}: area '200'", "reads"),
    "crowds throughout a class": Case(mostly_crowds, "mostly crowds", "6 of 7 objects of disc", "reads"),
    "area as text": Case(annotation(area="big"), "area that is not a number above 0", rf"{A}: area 'big'", "reads"),
    "area NaN": Case(annotation(area=NAN), "area that is not a number above 0", rf"{A}: area nan", "reads"),
    "area above the box's": Case(annotation(area=999), "area larger than the box", rf"{A}: area 999", "reads"),
    # Boxes
    "no box": Case(forget("annotation", "bbox"), NOT_FOUR, rf"{A}: bbox None", "drops"),
    "three numbers": Case(annotation(bbox=[1, 2, 3]), NOT_FOUR, rf"{A}: bbox \[1, 2, 3\]", "drops"),
    "five numbers": Case(annotation(bbox=[1, 2, 3, 4, 5]), NOT_FOUR, rf"{A}: bbox \[1, 2, 3, 4, 5\]", "drops"),
    "NaN": Case(annotation(bbox=[1, NAN, 3, 4]), NOT_FOUR, rf"{A}: bbox \[1, nan", "drops"),
    "infinite": Case(annotation(bbox=[1, 2, float("inf"), 4]), NOT_FOUR, rf"{A}: bbox \[1, 2, inf", "drops"),
    "words": Case(annotation(bbox=["a", "b", "c", "d"]), NOT_FOUR, rf"{A}: bbox \['a'", "drops"),
    "null in a box": Case(annotation(bbox=[1, 2, None, 4]), NOT_FOUR, rf"{A}: bbox \[1, 2, None", "drops"),
    "box as text": Case(annotation(bbox="1 2 3 4"), NOT_FOUR, rf"{A}: bbox '1 2", "drops"),
    "inverted": Case(annotation(bbox=[25, 16, -20, -10]), "inverted box", rf"{A}: bbox \[25, 16, -20", "drops"),
    "no height": Case(annotation(bbox=[5, 6, 20, 0]), "box without area", rf"{A}: bbox \[5, 6, 20, 0\]", "drops"),
    "outside": Case(
        annotation(bbox=[60, 6, 20, 10]), "box outside its image", rf"{A}: bbox \[60, .* in 60x50", "drops"
    ),
    "above": Case(annotation(bbox=[5, -20, 20, 10]), "box outside its image", rf"{A}: bbox \[5, -20", "drops"),
    "reaches out": Case(
        annotation(bbox=[50, 6, 20, 10], segmentation=[[50, 6, 70, 6, 70, 16, 50, 16]]),
        "box that reaches out of its image",
        rf"{A}: bbox \[50, 6, 20, 10\] in 60x50",
        "reads",
    ),
    "reaches out a little": Case(
        annotation(bbox=[40, 6, 20.5, 10], segmentation=[[40, 6, 60, 6, 60, 16, 40, 16]]),
        "box less than a pixel out of its image",
        rf"{A}: bbox \[40, 6, 20\.5",
        "reads",
    ),
    "smaller than a pixel": Case(
        annotation(bbox=[5, 6, 0.3, 0.3], area=0.09, segmentation=[[5, 6, 5.3, 6, 5.3, 6.3]]),
        "box smaller than a pixel",
        rf"{A}: bbox \[5, 6, 0\.3",
        "reads",
    ),
    "whole image": Case(
        annotation(bbox=[0, 0, 60, 50], area=3000, segmentation=[[0, 0, 60, 0, 60, 50, 0, 50]]),
        "box as large as its image",
        rf"{A}: bbox \[0, 0, 60, 50\]",
        "reads",
    ),
    "very long": Case(
        annotation(bbox=[5, 6, 45, 2], area=90, segmentation=[[5, 6, 50, 6, 50, 8, 5, 8]]),
        "very long box",
        rf"{A}: bbox \[5, 6, 45, 2\]",
        "reads",
    ),
    "same box twice": Case(add_annotation(), "same box twice", r"annotation 77 of .* and annotation 3", "reads"),
    "same box with two categories": Case(
        add_annotation(category_id=7), "same box with two categories", "annotation 77 of .* and annotation 3", "reads"
    ),
    "corners": Case(
        each(lambda a: a.update(bbox=[a["bbox"][0] + 20, a["bbox"][1] + 20, 59, 49])),
        "boxes that look like corners",
        "of 8 boxes reach out",
        "stops",
    ),
    "fractions": Case(
        each(lambda a: a.update(bbox=[0.1, 0.2, 0.3, 0.4])), "boxes that look like fractions", "all 8 boxes", "stops"
    ),
    # Masks
    "no mask": Case(forget("annotation", "segmentation"), NO_MASK, rf"{A}: no segmentation", "drops"),
    "two points": Case(annotation(segmentation=[[1, 2, 3, 4]]), NO_MASK, rf"{A}: polygons that", "drops"),
    "odd polygon": Case(annotation(segmentation=[[1, 2, 3, 4, 5, 6, 7]]), NO_MASK, rf"{A}: polygons that", "drops"),
    "polygon of words": Case(annotation(segmentation=[["a"] * 6]), NO_MASK, rf"{A}: polygons that", "drops"),
    "polygon with NaN": Case(annotation(segmentation=[[1, 2, 3, 4, 5, NAN]]), NO_MASK, rf"{A}: .*not finite", "drops"),
    "flat polygon": Case(annotation(segmentation=[[5, 6, 15, 6, 25, 6]]), "mask without area", A, "reads"),
    "mask as text": Case(annotation(segmentation="polygon"), NO_MASK, rf"{A}: neither", "drops"),
    "runs of another size": Case(runs(size=[9, 9]), NO_MASK, rf"{A}: run lengths of size \[9, 9\]", "drops"),
    "runs without size": Case(runs(size=None), NO_MASK, rf"{A}: run lengths of size", "drops"),
    "runs that are too short": Case(runs(counts=[3, 4]), NO_MASK, rf"{A}: .*do not add up to 50 x 60", "drops"),
    "runs below 0": Case(runs(counts=[-5, 3005]), NO_MASK, rf"{A}: .*do not add up", "drops"),
    "broken compressed runs": Case(runs(counts="~~~"), NO_MASK, rf"{A}: .*do not add up", "drops"),
    "empty runs": Case(runs(counts=[HEIGHT * WIDTH]), "mask without area", A, "reads"),
    "mask elsewhere": Case(
        annotation(segmentation=[[35, 26, 55, 26, 55, 36, 35, 36]]),
        "mask that disagrees with its box",
        rf"{A}: mask in \[35, 26, 20, 10\], bbox",
        "reads",
    ),
    # LVIS
    "unknown excluded category": Case(
        image(neg_category_ids=[7, 99]),
        "image list with an unknown category",
        rf"{I}: neg_category_ids has \[99\]",
        "reads",
    ),
    "excluded, but there": Case(
        image(neg_category_ids=[12]), "object of a category that its image excludes", rf"{A} \(category 12\)", "reads"
    ),
}


def test_there_are_sixty_kinds_of_bad_input() -> None:
    assert len(CASES) >= 60
    assert len({c.kind for c in CASES.values()}) >= 50


def test_a_data_set_without_a_fault_has_no_findings(planted: Planted, composed: DictConfig) -> None:
    for split in inspect(written(planted, composed)):
        assert not split.findings.counts, split.findings.examples


@pytest.mark.parametrize("name", CASES)
def test_check_finds_it_and_names_the_record(planted: Planted, composed: DictConfig, name: str) -> None:
    case = CASES[name]
    case.plant(planted)
    findings = {s.name: s.findings for s in inspect(written(planted, composed))}[case.split]
    assert findings.counts[case.kind] == case.count, findings.counts
    record = findings.examples[case.kind][0].record
    assert re.search(case.record, record), record
    assert findings.source.parent == planted.folder
    assert RULES[case.kind].advice


# What `fix=true` does not decide for the user.
NOT_MENDED = {
    *("unusable annotation file", "no image folder", "no images", "no objects", "unknown class in data.classes"),
    *("bad category record", "duplicate category id", "duplicate category name", "category that training lacks"),
    *("boxes that look like corners", "boxes that look like fractions"),
}


def errors(splits: list[Split], left: bool = False) -> int:
    return sum(s.findings.total("error", unmended=left) for s in splits)


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if RULES[c.kind].severity == "error"])
def test_a_mended_file_passes_and_keeps_the_rest(planted: Planted, composed: DictConfig, name: str) -> None:
    case = CASES[name]
    case.plant(planted)
    config = written(planted, composed)
    splits = inspect(config)
    assert errors(splits) > 0
    assert (errors(splits, left=True) > 0) == (case.kind in NOT_MENDED)
    if case.kind in NOT_MENDED:
        return
    original = (planted.folder / "train.json").read_bytes()
    for split, target in zip(splits, targets(splits, None), strict=True):
        words = write_clean(split, target)
        config.data[f"{split.name}_annotations"] = target.name
        assert ("nothing" in words) == (split.name != case.split)
    assert (planted.folder / "train.json").read_bytes() == original
    again = inspect(config)
    assert errors(again) == 0, [s.findings.examples for s in again]
    cleaned = json.loads((planted.folder / "train.clean.json").read_bytes())
    assert cleaned["info"] == {"year": 2026}
    pristine = document(4, first=100)
    assert all(r in cleaned["images"] for r in pristine["images"] if r["id"] not in case.removed)
    assert all(r in cleaned["annotations"] for r in pristine["annotations"] if r["image_id"] not in case.removed)


def test_training_refuses_what_check_calls_an_error() -> None:
    """Every rule has a case, but for those of the check alone; what training does with it follows from the table."""
    refused = {rule for rule, r in RULES.items() if r.severity == "error" and r.training}
    by_training = {case.kind: set() for case in CASES.values()}
    for case in CASES.values():
        by_training[case.kind].add(case.training)
    for rule, answers in by_training.items():
        assert answers <= ({"drops", "stops"} if rule in refused else {"reads"}), rule
    assert refused - by_training.keys() == {"fewer images than one step takes"}


def module(config: DictConfig, on_error: str) -> Any:
    """The data module of training, after it read both splits."""
    config.data.on_error = on_error
    data = instantiate(config.data)
    data.setup("fit")
    return data


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.training == "drops"])
def test_training_stops_with_a_named_error_or_counts(planted: Planted, composed: DictConfig, name: str) -> None:
    case = CASES[name]
    case.plant(planted)
    config = written(planted, composed)
    with pytest.raises(
        UserError, match=r"(?s)train\.json: \d bad records?\n.*(1?03|number 1|annotation).*on_error=skip"
    ):
        module(config, "stop")
    data = module(config, "skip")
    assert data.train_set.report.errors == inspect(config)[0].findings.errors
    assert sum(data.train_set.report.errors.values()) == case.lost
    assert not data.val_set.report.errors
    for dataset in (data.train_set, data.val_set):
        for index in range(len(dataset)):
            assert dataset[index].image_id == dataset.image_ids[index]


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.training == "stops"])
def test_training_stops_whatever_is_wrong_with_the_whole(planted: Planted, composed: DictConfig, name: str) -> None:
    CASES[name].plant(planted)
    config = written(planted, composed)
    for on_error in ("stop", "skip"):
        with pytest.raises(UserError, match=r"train\.json|val\.json|no\.json|image folder|data\.classes"):
            module(config, on_error)


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.training == "reads"])
def test_training_reads_what_it_can_make_sense_of(planted: Planted, composed: DictConfig, name: str) -> None:
    CASES[name].plant(planted)
    data = module(written(planted, composed), "stop")
    for dataset in (data.train_set, data.val_set):
        assert not dataset.report.errors
        assert dataset.class_names == ("disc", "square", "star") or "near" in name or "lacks" in name
        for index in range(len(dataset)):
            sample = dataset[index]
            assert sample.boxes.isfinite().all()
            assert (sample.truth["area"] > 0).all()
