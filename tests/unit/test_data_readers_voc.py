"""Pascal VOC: what hand-written files mean, and what torchvision's parser of them says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coco_files import write_image
from PIL import Image
from torchvision.datasets import VOCDetection

from codetr.data.dataset import DetectionDataset
from codetr.data.readers import voc
from codetr.errors import UserError


def thing(name: str = "cat", box: str = "11 21 30 60", more: str = "") -> str:
    corners = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box.split(), strict=False))
    return f"<object><name>{name}</name><bndbox>{corners}</bndbox>{more}</object>"


def xml(*objects: str, size: str = "<width>80</width><height>64</height><depth>3</depth>", name: str = "x.jpg") -> str:
    return f"<annotation><filename>{name}</filename><size>{size}</size>{''.join(objects)}</annotation>"


def voc_set(root: Path, files: dict[str, str], **lists: str) -> Path:
    """The standard layout, with an image of 80 x 64 pixels for every XML file."""
    for stem, text in files.items():
        (root / "Annotations" / stem).parent.mkdir(parents=True, exist_ok=True)
        (root / "Annotations" / f"{stem}.xml").write_text(text)
        write_image(root / "JPEGImages" / f"{stem}.jpg", 80, 64)
    (root / "ImageSets" / "Main").mkdir(parents=True)
    for name, content in lists.items():
        (root / "ImageSets" / "Main" / f"{name}.txt").write_text(content)
    return root / "ImageSets" / "Main"


def parts(document: Any) -> tuple[list[dict], list[dict], list[str]]:
    return list(document["images"]), list(document["annotations"]), [c["name"] for c in document["categories"]]


def test_pixels_count_from_one_and_both_ends_are_inside(tmp_path: Path) -> None:
    """The whole image is 1 1 80 64; one pixel has equal ends."""
    objects = [thing(box="1 1 80 64"), thing("dog", "80 64 80 64"), thing(box="11 21 30 60"), thing(box="1.5 2.25 4 5")]
    lists = voc_set(tmp_path, {"a": xml(*objects)}, train="a\n")
    images, objects, names = parts(voc.read(lists / "train.txt"))
    assert images == [{"id": 1, "file_name": "a.jpg", "width": 80, "height": 64, "where": "Annotations/a.xml"}]
    boxes = [[0, 0, 80, 64], [79, 63, 1, 1], [10, 20, 20, 40], [0.5, 1.25, 3.5, 3.75]]
    assert [o["bbox"] for o in objects] == boxes
    assert [names[o["category_id"] - 1] for o in objects] == ["cat", "dog", "cat", "cat"]
    assert [o["where"] for o in objects] == [f"Annotations/a.xml, object {i}" for i in (1, 2, 3, 4)]


def test_flags(tmp_path: Path) -> None:
    flags = "<difficult>1</difficult><truncated>1</truncated>", "<difficult>0</difficult>", "<iscrowd>1</iscrowd>", ""
    lists = voc_set(tmp_path, {"a": xml(*(thing(more=f) for f in flags))}, train="a")
    _, objects, _ = parts(voc.read(lists / "train.txt"))
    found = [{k: v for k, v in o.items() if k in ("ignore", "truncated", "iscrowd")} for o in objects]
    assert found == [{"ignore": 1, "truncated": 1}, {"ignore": 0}, {"iscrowd": 1}, {}]


def test_parts_of_an_object_are_no_objects(tmp_path: Path) -> None:
    """VOC's person layout has parts, with names and boxes of their own."""
    part = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>3</xmax><ymax>4</ymax></bndbox></part>"
    lists = voc_set(tmp_path, {"a": xml(thing("person", more=part))}, train="a")
    _, objects, names = parts(voc.read(lists / "train.txt"))
    assert [(names[o["category_id"] - 1], o["bbox"]) for o in objects] == [("person", [10, 20, 20, 40])]


def test_the_same_objects_as_torchvision(tmp_path: Path) -> None:
    """Its data set reads the standard layout; its boxes are those of the file."""
    rng = np.random.default_rng(0)
    files = {}
    for i in range(7):
        low = rng.integers(1, 40, (i, 2))
        high = low + rng.integers(0, 20, (i, 2))
        boxes = np.concatenate([low, high], 1).tolist()
        files[f"{i:03}"] = xml(*(thing(str(rng.choice(voc.CLASSES)), " ".join(map(str, b))) for b in boxes))
    root = tmp_path / "VOCdevkit" / "VOC2012"
    lists = voc_set(root, files, train="005\n001\n003\n000\n", val="002\n")
    images, objects, names = parts(voc.read(lists / "train.txt"))
    theirs = VOCDetection(tmp_path, "2012", "train")
    assert len(images) == len(theirs) == 4
    assert names == list(voc.CLASSES)
    for image, path, (_, target) in zip(images, theirs.images, theirs, strict=True):
        assert root / "JPEGImages" / image["file_name"] == Path(path)
        mine = [o for o in objects if o["image_id"] == image["id"]]
        expected = target["annotation"]["object"]
        assert [names[o["category_id"] - 1] for o in mine] == [o["name"] for o in expected]
        for one, other in zip(mine, expected, strict=True):
            x, y, w, h = one["bbox"]
            corners = {"xmin": x + 1, "ymin": y + 1, "xmax": x + w, "ymax": y + h}
            assert {k: str(int(v)) for k, v in corners.items()} == other["bndbox"]


def test_classes_agree_between_the_lists_of_a_folder(tmp_path: Path) -> None:
    lists = voc_set(tmp_path, {"a": xml(thing("zebra")), "b": xml(thing("ant"), thing("cat"))}, train="a", val="b")
    for name in ("train", "val"):
        *_, names = parts(voc.read(lists / f"{name}.txt"))
        assert names == ["ant", "cat", "zebra"]
    _, objects, names = parts(voc.read(lists / "val.txt", names=["zebra", "cat"]))
    assert names == ["zebra", "cat", "ant"]
    assert [o["category_id"] for o in objects] == [3, 2]


def test_a_bare_folder_of_files(tmp_path: Path) -> None:
    """Sorted; images beside them, of any kind, by the name of the XML file rather than its `filename`."""
    for stem in ("b", "a", "sub/c", "d"):
        path = tmp_path / "labels" / f"{stem}.xml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(xml(thing(), name="C:\\work\\d.bmp"))
    write_image(tmp_path / "labels" / "a.png", 80, 64)
    write_image(tmp_path / "images" / "b.JPEG", 80, 64)
    write_image(tmp_path / "images" / "sub" / "c.jpg", 80, 64)
    images, objects, _ = parts(voc.read(tmp_path / "labels"))
    assert [i["file_name"] for i in images] == ["a.png", "b.JPEG", "d.bmp", "sub/c.jpg"]
    assert [o["image_id"] for o in objects] == [1, 2, 3, 4]


def test_every_change_is_seen(tmp_path: Path) -> None:
    """By the data set, which keeps a table of what it read: of a file, of a list, of what is there; and `difficult`."""
    lists = voc_set(tmp_path, {"a": xml(thing()), "sub/b": xml(thing())}, train="a\n")

    def counts() -> tuple[int, ...]:
        found = DetectionDataset(tmp_path / "JPEGImages", lists / "train.txt", reader=voc.read, on_error="skip")
        return (len(found), found.label_counts["cat"])

    annotations = tmp_path / "Annotations"
    assert counts() == (1, 1)
    (annotations / "a.xml").write_text(xml(thing(), thing(), thing(more="<difficult>1</difficult>")))
    assert counts() == (1, 2)
    (lists / "train.txt").write_text("a\nsub/b\nc\n")
    assert counts() == (2, 3)
    write_image(tmp_path / "JPEGImages" / "c.jpg", 80, 64)
    (annotations / "c.xml").write_text(xml(thing()))
    assert counts() == (3, 4)
    (annotations / "sub" / "b.xml").unlink()
    assert counts() == (2, 3)


def test_bad_files_stop_or_are_skipped(tmp_path: Path) -> None:
    texts = {
        "a": xml(thing(), thing().replace("name>", "title>"), thing(box="30 20 10 40")),
        "b": "not < xml",
        "c": xml(thing(box="81 1 90 9"), thing(box="1 2 x 4")),
    }
    lists = voc_set(tmp_path, texts, train="a\nb\nc\nd\n")
    with pytest.raises(UserError) as raised:
        DetectionDataset(tmp_path / "JPEGImages", lists / "train.txt", reader=voc.read)
    for message in (
        "train.txt: 6 bad records",
        "2 x bad image record: Annotations/b.xml: cannot be read as XML",
        "Annotations/d.xml: no such file",
        "1 x unknown category id: Annotations/a.xml, object 2: no <name>",
        "1 x inverted box: Annotations/a.xml, object 3",
        "1 x box outside its image: Annotations/c.xml, object 1",
        "1 x box that is not 4 finite numbers: Annotations/c.xml, object 2: no number as xmax",
    ):
        assert message in str(raised.value)
    found = DetectionDataset(tmp_path / "JPEGImages", lists / "train.txt", reader=voc.read, on_error="skip")
    assert (len(found), found.label_counts["cat"]) == (2, 1)


SIZE = "no <size> with a width and a height"
BROKEN_IMAGES = {
    "no xml": ("not < xml", r"a\.xml: cannot be read as XML \(.*line 1"),
    "cut": (xml(thing())[:-30], r"a\.xml: cannot be read as XML"),
    "no size": (xml(thing()).replace("size>", "sise>"), SIZE),
    "no height": (xml(thing(), size="<width>80</width>"), SIZE),
    "size 0": (xml(thing(), size="<width>0</width><height>0</height>"), SIZE),
    "size in words": (xml(thing(), size="<width>wide</width><height>high</height>"), SIZE),
}


@pytest.mark.parametrize("case", BROKEN_IMAGES)
def test_a_broken_file_is_an_image_without_a_size(tmp_path: Path, case: str) -> None:
    text, message = BROKEN_IMAGES[case]
    lists = voc_set(tmp_path, {"a": text, "b": xml(thing())}, train="a\nb\n")
    image = next((tmp_path / "JPEGImages").glob("a.*"))
    if message == SIZE:
        images, _, _ = parts(voc.read(lists / "train.txt"))
        with Image.open(image) as picture:
            assert (images[0]["width"], images[0]["height"]) == picture.size
        assert images[0]["where"] == "Annotations/a.xml"
        image.unlink()
    images, _, _ = parts(voc.read(lists / "train.txt"))
    assert "width" not in images[0]
    assert re.search(message, images[0]["where"])
    assert images[1]["width"] == 80


def test_a_listed_image_without_a_file(tmp_path: Path) -> None:
    lists = voc_set(tmp_path, {"a": xml(thing())}, train="b\na\n")
    images, objects, _ = parts(voc.read(lists / "train.txt"))
    assert images[0] == {"id": 1, "file_name": "b.jpg", "where": "Annotations/b.xml: no such file"}
    assert [o["image_id"] for o in objects] == [2]


BROKEN_OBJECTS = {
    "no name": (thing().replace("name>", "title>"), "no <name>"),
    "empty name": (thing(name=" "), "no <name>"),
    "no box": ("<object><name>cat</name></object>", "no number as xmin, ymin, xmax, ymax in <bndbox>"),
    "three numbers": (thing(box="1 2 3"), "no number as ymax in <bndbox>"),
    "words": (thing(box="1 2 right 4"), "no number as xmax in <bndbox>"),
    "nan": (thing(box="1 nan 3 inf"), "no number as ymin, ymax in <bndbox>"),
}


@pytest.mark.parametrize("case", BROKEN_OBJECTS)
def test_a_broken_object_says_where_it_is(tmp_path: Path, case: str) -> None:
    text, message = BROKEN_OBJECTS[case]
    lists = voc_set(tmp_path, {"a": xml(thing(), text)}, train="a")
    _, objects, _ = parts(voc.read(lists / "train.txt"))
    assert objects[1]["where"] == f"Annotations/a.xml, object 2: {message}"
    assert (objects[1]["category_id"] is None) == ("name" in case)
    assert (objects[1]["bbox"] is None) == ("name" not in case)


def test_what_no_record_can_be_blamed_for(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.txt does not exist: give a list such as ImageSets/Main/train\.txt"):
        voc.read(tmp_path / "train.txt")
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(UserError, match=r"empty\.txt names no image"):
        voc.read(tmp_path / "empty.txt")
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="holds no XML file"):
        voc.read(tmp_path / "other")
    (tmp_path / "list.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"list\.txt cannot be read"):
        voc.read(tmp_path / "list.txt")
