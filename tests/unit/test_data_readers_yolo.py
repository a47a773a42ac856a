"""Ultralytics YOLO: what hand-written files mean, in every layout of data.yaml, and where their faults are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coco_files import write_image
from PIL import Image

from codetr.data.dataset import DetectionDataset
from codetr.data.readers import folder, yolo
from codetr.errors import UserError

NAMES = "names: [cat, dog]\n"


def yolo_set(root: Path, settings: str, labels: dict[str, str | None], where: str = "images/train") -> Path:
    """Images of 80 x 64 pixels with these labels (None: no file); returns data.yaml."""
    for stem, text in labels.items():
        image = root / where / f"{stem}.jpg"
        write_image(image, 80, 64)
        path = Path("labels".join(str(image).rsplit("images", 1))).with_suffix(".txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        if text is not None:
            path.write_text(text)
    (root / "data.yaml").write_text(settings)
    return root / "data.yaml"


def parts(document: Any) -> tuple[list[dict], list[dict], list[tuple[int, str]]]:
    categories = [(c["id"], c["name"]) for c in document["categories"]]
    return list(document["images"]), list(document["annotations"]), categories


def test_boxes(tmp_path: Path) -> None:
    """x = (cx - w / 2) W, and so on; an image without a label file, or with an empty one, has no objects."""
    labels = {"a": "0 0.5 0.5 1 1\n\n1 0.25 0.75 0.125 0.25\n", "b": None, "c": "", "d": "1 0.5 0.25 0.1 0.5"}
    source = yolo_set(tmp_path, "train: images/train\n" + NAMES, labels)
    images, objects, names = parts(yolo.read(source / "train"))
    files = [f"images/train/{s}.jpg" for s in "abcd"]
    assert images == [{"id": i + 1, "file_name": f, "width": 80, "height": 64} for i, f in enumerate(files)]
    assert names == [(0, "cat"), (1, "dog")]
    assert [(o["image_id"], o["category_id"]) for o in objects] == [(1, 0), (1, 1), (4, 1)]
    expected = [[0, 0, 80, 64], [15, 40, 10, 16], [36, 0, 8, 32]]
    np.testing.assert_allclose([o["bbox"] for o in objects], expected, rtol=0, atol=1e-12)
    places = ("a.txt, line 1", "a.txt, line 3", "d.txt, line 1")
    assert [o["where"] for o in objects] == [f"labels/train/{place}" for place in places]


def test_random_boxes_to_the_last_digits(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    corners = np.sort(rng.random((50, 2, 2)), 1) * [80, 64]
    low, high = corners[:, 0], corners[:, 1]
    centre, extent = (low + high) / 2 / [80, 64], (high - low) / [80, 64]
    lines = [
        " ".join(map(repr, ["0", *c, *e])).replace("'", "")
        for c, e in zip(centre.tolist(), extent.tolist(), strict=True)
    ]
    source = yolo_set(tmp_path, "train: images/train\n" + NAMES, {"a": "\n".join(lines)})
    _, objects, _ = parts(yolo.read(source / "train"))
    np.testing.assert_allclose([o["bbox"] for o in objects], np.concatenate([low, high - low], 1), rtol=0, atol=1e-11)


def test_polygons(tmp_path: Path) -> None:
    """A right triangle and a concave arrow: the box is the extent, the area that of the polygon."""
    line = "1 0 0 0.5 0 0 0.25\n0 0 0 0.5 0.25 0 0.5 0.125 0.25\n"
    source = yolo_set(tmp_path, "train: images/train\n" + NAMES, {"a": line})
    _, (triangle, arrow), _ = parts(yolo.read(source / "train"))
    assert (triangle["category_id"], triangle["bbox"], triangle["area"]) == (1, [0, 0, 40, 16], 320)
    assert triangle["segmentation"] == [[0, 0, 40, 0, 0, 16]]
    assert (arrow["bbox"], arrow["area"]) == ([0, 0, 40, 32], 40 * 32 / 2 - 10 * 32 / 2)


TRAIN = {"a": "0 0.5 0.5 0.1 0.1", "b": "1 0.5 0.5 0.1 0.1"}
SETTINGS = {
    "from its folder": "train: images/train\n",
    "path": "path: .\ntrain: images/train\n",
    "absolute path": "path: ROOT\ntrain: images/train\n",
    "absolute folder": "train: ROOT/images/train\n",
    "moved": "path: /nowhere/at/all\ntrain: images/train\n",
    "one up": "train: ../images/train\n",
    "list of folders": "train: [images/train/sub, images/train/other]\n",
    "a file": "train: list.txt\n",
    "current folder": "path: sets/mine\ntrain: images/train\n",
}


@pytest.mark.parametrize("case", SETTINGS)
def test_layouts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """All the ways to name the same two images."""
    root = tmp_path / "sets" / "mine"
    monkeypatch.chdir(tmp_path)
    settings = SETTINGS[case].replace("ROOT", str(root)) + NAMES
    source = yolo_set(root, settings, {"sub/a": TRAIN["a"], "other/b": TRAIN["b"]})
    (root / "list.txt").write_text(f"./images/train/other/b.jpg\n\n{root}/images/train/sub/a.jpg\n")
    images, objects, _ = parts(yolo.read(source / "train"))
    label_of = {o["image_id"]: o["category_id"] for o in objects}
    assert {i["file_name"]: label_of[i["id"]] for i in images} == {
        "images/train/sub/a.jpg": 0,
        "images/train/other/b.jpg": 1,
    }


def test_the_last_images_folder_is_the_one_with_labels(tmp_path: Path) -> None:
    """As exports of Roboflow have it: train/images, train/labels; even below a folder of the same name."""
    root = tmp_path / "images" / "mine"
    source = yolo_set(root, "train: ../train/images\nval: ../valid/images\n" + NAMES, TRAIN, where="train/images")
    _, objects, _ = parts(yolo.read(source / "train"))
    assert [o["where"] for o in objects] == ["train/labels/a.txt, line 1", "train/labels/b.txt, line 1"]


def test_labels_beside_images_where_no_folder_is_named_images(tmp_path: Path) -> None:
    write_image(tmp_path / "train" / "a.jpg", 80, 64)
    (tmp_path / "train" / "a.txt").write_text(TRAIN["a"])
    (tmp_path / "data.yaml").write_text("train: train\n" + NAMES)
    _, objects, _ = parts(yolo.read(tmp_path / "data.yaml" / "train"))
    assert objects[0]["where"] == "train/a.txt, line 1"


def test_names_with_numbers(tmp_path: Path) -> None:
    source = yolo_set(tmp_path, "train: images/train\nnames:\n  3: dog\n  0: cat\n", {"a": "3 0.5 0.5 0.1 0.1"})
    _, objects, names = parts(yolo.read(source / "train"))
    assert names == [(0, "cat"), (3, "dog")]
    assert objects[0]["category_id"] == 3


def test_images_outside_of_the_set_keep_their_whole_path(tmp_path: Path) -> None:
    root = tmp_path / "mine"
    source = yolo_set(root, f"train: {tmp_path}/images\n" + NAMES, {"a": None})
    write_image(tmp_path / "images" / "x.png", 40, 30)
    images, _, _ = parts(yolo.read(source / "train"))
    assert images == [{"id": 1, "file_name": f"{tmp_path}/images/x.png", "width": 40, "height": 30}]


def test_sizes_are_those_a_viewer_shows(tmp_path: Path) -> None:
    """A photograph held upright is stored on its side."""
    source = yolo_set(tmp_path, "train: images/train\n" + NAMES, {"a": "0 0.5 0.5 1 1"})
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (80, 64)).save(tmp_path / "images/train/a.jpg", exif=exif)
    images, objects, _ = parts(yolo.read(source / "train"))
    assert (images[0]["width"], images[0]["height"], objects[0]["bbox"]) == (64, 80, [0, 0, 64, 80])


def test_every_change_is_seen(tmp_path: Path) -> None:
    """Of labels, empty ones too, of images, of names; by the data set, which keeps a table of what it read."""
    source = yolo_set(tmp_path, "train: images/train\n" + NAMES, {"a": "", "b": None})
    (tmp_path / "labels" / "train" / "a.txt").unlink()
    (tmp_path / "labels" / "train").rmdir()
    (tmp_path / "labels").rmdir()

    def counts() -> tuple[int, ...]:
        found = DetectionDataset(tmp_path, source / "train", reader=yolo.read)
        return (len(found), *found.label_counts.values())

    labels = tmp_path / "labels" / "train"
    assert counts() == (2, 0, 0)
    labels.mkdir(parents=True)
    (labels / "a.txt").write_text("")
    assert counts() == (2, 0, 0)
    (labels / "a.txt").write_text(TRAIN["a"])
    assert counts() == (2, 1, 0)
    (labels / "b.txt").write_text(TRAIN["a"])
    assert counts() == (2, 2, 0)
    (labels / "b.txt").write_text(TRAIN["b"])
    assert counts() == (2, 1, 1)
    write_image(tmp_path / "images" / "train" / "c.jpg", 80, 64)
    assert counts() == (3, 1, 1)
    source.write_text("train: images/train\nnames: [cat, dog, emu]\n")
    assert counts() == (3, 1, 1, 0)


def test_bad_lines_stop_or_are_skipped(tmp_path: Path) -> None:
    labels = {"a": "0 0.5 0.5 0.1 0.1\n0 0.5 0.5 0.1\n", "b": "7 0.5 0.5 0.1 0.1\n1 0.5 0.5 0 0.1\n"}
    source = yolo_set(tmp_path, "train: images/train\n" + NAMES, labels)
    with pytest.raises(UserError) as raised:
        DetectionDataset(tmp_path, source / "train", reader=yolo.read)
    for message in (
        "data.yaml/train: 3 bad records",
        "1 x unknown category id: labels/train/b.txt, line 1 (category 7)",
        "1 x box that is not 4 finite numbers: labels/train/a.txt, line 2: 4 numbers",
        "1 x box without area: labels/train/b.txt, line 2",
    ):
        assert message in str(raised.value)
    found = DetectionDataset(tmp_path, source / "train", reader=yolo.read, on_error="skip")
    assert (len(found), found.label_counts) == (2, {"cat": 1, "dog": 0})


LINES = {
    "words": ("cat 0.5 0.5 0.1 0.1", "not only numbers", None),
    "four": ("1 0.5 0.5 0.1", "4 numbers, neither 5", 1),
    "score": ("1 0.5 0.5 0.1 0.1 0.9", "6 numbers, neither 5", 1),
    "half a point": ("1 0 0 0.5 0 0 0.25 1", "8 numbers, neither 5", 1),
    "pixels": ("1 40 32 10 10", "divided by the image's width and height", 1),
    "negative": ("1 0.5 0.5 -0.1 0.1", "divided by the image's width and height", 1),
    "nan": ("1 nan 0.5 0.1 0.1", "divided by the image's width and height", 1),
    "class": ("1.5 0.5 0.5 0.1 0.1", "1.5 is no class number", None),
}


@pytest.mark.parametrize("case", LINES)
def test_a_broken_line_says_where_it_is(tmp_path: Path, case: str) -> None:
    line, message, label = LINES[case]
    source = yolo_set(tmp_path, "train: images/train\n" + NAMES, {"a": f"0 0.5 0.5 0.1 0.1\n{line}\n"})
    _, (good, bad), _ = parts(yolo.read(source / "train"))
    assert good["bbox"] is not None
    assert bad["bbox"] is None
    assert bad["category_id"] == label
    assert bad["where"].startswith("labels/train/a.txt, line 2: ")
    assert message in bad["where"]


def test_broken_files(tmp_path: Path) -> None:
    source = yolo_set(tmp_path, "train: list.txt\n" + NAMES, {"a": None, "b": None})
    (tmp_path / "images/train/a.jpg").write_bytes(b"no image")
    (tmp_path / "labels/train/b.txt").write_bytes(b"\xff\xfe\x80")
    (tmp_path / "list.txt").write_text("./images/train/a.jpg\n./images/train/b.jpg\n./images/train/gone.jpg\n")
    images, objects, _ = parts(yolo.read(source / "train"))
    assert [("width" in i) for i in images] == [False, True, False]
    assert "not an image of a kind" in images[0]["where"]
    assert images[2]["where"] == f"{tmp_path}/images/train/gone.jpg: no such file"
    (place,) = (o["where"] for o in objects)
    assert place.startswith("labels/train/b.txt: cannot be read as text ('utf-8' codec can't decode")


USER_ERRORS = {
    "no split": (NAMES, "data.yaml has no `train`: add where those images are"),
    "no names": ("train: images/train\n", "`names` must list the classes"),
    "names in words": ("train: images/train\nnames: {a: cat}\n", "`names` must list the classes"),
    "no mapping": ("- 1\n", "is not the data.yaml of a YOLO set"),
    "no yaml": ("train: [\n", "cannot be read as YAML"),
    "no folder": ("path: x\ntrain: images/trian\n" + NAMES, "points to images/trian, but there is no .*images/trian"),
    "empty folder": ("train: empty\n" + NAMES, "no image in .*empty, where `train` points to"),
    "key points": ("train: images/train\nkpt_shape: [17, 3]\n" + NAMES, "its labels are key points"),
}


@pytest.mark.parametrize("case", USER_ERRORS)
def test_a_data_yaml_that_does_not_say_enough(tmp_path: Path, case: str) -> None:
    settings, message = USER_ERRORS[case]
    source = yolo_set(tmp_path, settings, TRAIN)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message) as raised:
        yolo.read(source / "train")
    assert str(source) in str(raised.value)


def test_another_yaml_is_proposed(tmp_path: Path) -> None:
    source = yolo_set(tmp_path, NAMES, {})
    source.rename(tmp_path / "coco8.yaml")
    with pytest.raises(UserError, match=re.escape("data.yaml does not exist: perhaps coco8.yaml/train is meant")):
        yolo.read(source / "train")


def test_a_folder_of_images_alone(tmp_path: Path) -> None:
    write_image(tmp_path / "b.jpg", 80, 64)
    write_image(tmp_path / "a" / "c.png", 30, 20)
    (tmp_path / "notes.txt").touch()
    (tmp_path / "._b.jpg").touch()
    (tmp_path / "d.jpg").write_bytes(b"no image")
    images, objects, names = parts(folder.read(tmp_path))
    assert images[:2] == [
        {"id": 1, "file_name": "a/c.png", "width": 30, "height": 20},
        {"id": 2, "file_name": "b.jpg", "width": 80, "height": 64},
    ]
    assert images[2]["file_name"] == "d.jpg"
    assert "not an image of a kind" in images[2]["where"]
    assert objects == names == []
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no image in this folder"):
        folder.read(tmp_path / "empty")


BOX, OTHER = "0 0.5 0.5 0.5 0.5\n", "1 0.25 0.25 0.25 0.25\n"
# Of two images, the path of each and of its labels.
PLACES = {
    "other letters": ["images/train/A.JPG labels/train/a.TXT", "images/train/b.jpg labels/train/B.txt"],
    "a folder in other letters": ["Images/Train/a.jpg Labels/train/a.txt", "Images/Train/b.jpg Labels/train/b.txt"],
    "beside the images": ["images/train/a.jpg images/train/a.txt", "images/train/b.jpg images/train/b.TXT"],
    "a folder beside the images": ["train/a.jpg train/labels/a.txt", "train/b.jpg train/labels/b.txt"],
    "beside the folder of images": ["photos/a.jpg labels/a.txt", "photos/b.jpg labels/b.txt"],
    "names that differ in letters": ["images/train/a.jpg labels/train/a.txt", "images/train/A.jpg labels/train/A.txt"],
}


@pytest.mark.parametrize("case", PLACES)
def test_no_label_file_is_overlooked(tmp_path: Path, case: str) -> None:
    pairs = [pair.split() for pair in PLACES[case]]
    for (image, label), text in zip(pairs, (BOX, OTHER), strict=True):
        write_image(tmp_path / image, 80, 64, format="JPEG")
        (tmp_path / label).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / label).write_text(text)
    (tmp_path / "data.yaml").write_text(f"train: {pairs[0][0].rpartition('/')[0]}\n{NAMES}")
    images, objects, _ = parts(yolo.read(tmp_path / "data.yaml/train"))
    found = {i["file_name"]: [o["category_id"] for o in objects if o.get("image_id") == i["id"]] for i in images}
    assert found == {image: [label] for label, (image, _) in enumerate(pairs)}
    assert len(objects) == 2


def test_labels_without_an_image_are_named(tmp_path: Path) -> None:
    source = yolo_set(tmp_path, "train: images/train\n" + NAMES, {"a": BOX, "b": None})
    for name, text in (("lost.txt", OTHER), ("empty.txt", ""), ("classes.txt", "cat"), ("A.txt", OTHER)):
        (tmp_path / "labels/train" / name).write_text(text)
    with pytest.raises(UserError, match=r"2 x annotation of an unknown image: .*train/(A|lost)\.txt: no image has"):
        DetectionDataset(tmp_path, source / "train", reader=yolo.read)
    found = DetectionDataset(tmp_path, source / "train", reader=yolo.read, on_error="skip")
    assert found.label_counts == {"cat": 1, "dog": 0}


def cvat(root: Path) -> None:
    """YOLO 1.1: lists count from a folder that the archive lacks."""
    for stem, text in (("a", BOX), ("b", OTHER)):
        write_image(root / f"obj_train_data/{stem}.jpg", 80, 64)
        (root / f"obj_train_data/{stem}.txt").write_text(text)
    (root / "obj.names").write_text("cat\ndog\n")
    (root / "train.txt").write_text("data/obj_train_data/a.jpg\ndata/obj_train_data/b.jpg\n")
    (root / "obj.data").write_text("classes = 2\ntrain = data/train.txt\nnames = data/obj.names\nbackup = backup/\n")


def label_studio(root: Path) -> None:
    for stem, text in (("a", BOX), ("b", OTHER)):
        write_image(root / f"images/{stem}.jpg", 80, 64)
        (root / "labels").mkdir(exist_ok=True)
        (root / f"labels/{stem}.txt").write_text(text)
    (root / "classes.txt").write_text("cat\ndog\n")


def notes_alone(root: Path) -> None:
    label_studio(root)
    (root / "classes.txt").unlink()
    (root / "notes.json").write_text('{"categories": [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}]}')


def windows(root: Path) -> None:
    label_studio(root)
    (root / "data.yaml").write_text("path: C:\\Users\\me\\mine\ntrain: images\nnames: [cat, dog]\n")


def windows_list(root: Path) -> None:
    label_studio(root)
    (root / "all.txt").write_text("".join(f"C:\\Users\\me\\mine\\images\\{name}.jpg\n" for name in "ab"))
    (root / "data.yaml").write_text("train: .\\all.txt\nnames: [cat, dog]\n")


@pytest.mark.parametrize("export", [cvat, label_studio, notes_alone, windows, windows_list])
def test_exports_are_read_as_they_are(tmp_path: Path, export: Any) -> None:
    export(tmp_path)
    found = DetectionDataset(tmp_path, tmp_path / "data.yaml/train", reader=yolo.read)
    assert found.class_names == ("cat", "dog")
    assert [found.truth(i)["labels"].tolist() for i in range(2)] == [[0], [1]]
    assert [found.path(i).name for i in range(2)] == ["a.jpg", "b.jpg"]


def test_a_split_that_an_export_lacks(tmp_path: Path) -> None:
    """The error shows a data.yaml that mends it."""
    label_studio(tmp_path)
    with pytest.raises(UserError, match=r"no data\.yaml, and no valid\.txt") as raised:
        yolo.read(tmp_path / "data.yaml/val")
    advised = str(raised.value).partition("such as\n")[2].replace("FOLDER", "images")
    (tmp_path / "data.yaml").write_text(advised)
    assert parts(yolo.read(tmp_path / "data.yaml/val"))[2] == [(0, "cat"), (1, "dog")]
