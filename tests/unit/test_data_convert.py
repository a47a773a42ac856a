"""`python -m codetr.data convert`: there and back nothing changes that a format has a place for."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coco_files import write_image
from pycocotools.coco import COCO
from torchvision.datasets import VOCDetection

from codetr.data.__main__ import run
from codetr.data.images import seen_size
from codetr.errors import UserError

SPLITS = ("train", "val")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded set, tiny: crowds, masks with holes and in pieces."""
    from codetr.shapes import PRESETS, generate

    root = tmp_path_factory.mktemp("data") / "shapes"
    generate(root, PRESETS["tiny"], seed=0, workers=1)
    return root


def shapes_to(form: str, shapes: Path, target: Path, *more: str) -> Path:
    assert run(["convert", "from=shapes_tiny", f"to={form}", f"source={shapes}", f"target={target}", *more]) == 0
    return target


def to_coco(form: str, source: Path, target: Path, *more: str) -> Path:
    assert run(["convert", f"from={form}", "to=coco", f"source={source}", f"target={target}", *more]) == 0
    return target


def objects(root: Path, split: str) -> dict[str, list[tuple[str, list[float], Any]]]:
    """File name -> (class, box, (crowd, ignored)) of its objects."""
    document = json.loads((root / "annotations" / f"instances_{split}.json").read_text())
    names = {c["id"]: c["name"] for c in document["categories"]}
    files = {i["id"]: i["file_name"] for i in document["images"]}
    found: dict[str, list[Any]] = {name: [] for name in files.values()}
    for a in document["annotations"]:
        flags = a.get("iscrowd", 0), a.get("ignore", 0)
        found[files[a["image_id"]]].append((names[a["category_id"]], a["bbox"], flags))
    return found


def assert_same(one: dict[str, list], other: dict[str, list], atol: float) -> None:
    assert list(one) == list(other)
    for name, expected in one.items():
        assert [(c, f) for c, _, f in expected] == [(c, f) for c, _, f in other[name]]
        boxes = [[b for _, b, _ in side] for side in (expected, other[name])]
        np.testing.assert_allclose(*boxes, rtol=0, atol=atol)


@pytest.mark.parametrize("images", ["link", "copy"])
def test_voc_and_back(shapes: Path, tmp_path: Path, images: str) -> None:
    """Boxes of whole pixels and crowds; torchvision reads the files between, too."""
    voc = shapes_to("voc", shapes, tmp_path / "VOCdevkit" / "VOC2012", f"images={images}")
    back = to_coco("voc", voc, tmp_path / "back", f"images={images}")
    for split in SPLITS:
        assert_same(objects(shapes, split), objects(back, split), atol=0)
        theirs = VOCDetection(tmp_path, "2012", split)
        mine = objects(shapes, split)
        assert [Path(p).name for p in theirs.images] == list(mine)
        for (image, target), expected in zip(theirs, mine.values(), strict=True):
            assert image.size == tuple(int(target["annotation"]["size"][k]) for k in ("width", "height"))
            found = [(o["name"], o["bndbox"]) for o in target["annotation"]["object"]]
            corners = [(c, (x + 1, y + 1, x + w, y + h)) for c, (x, y, w, h), _ in expected]
            assert [(c, tuple(map(int, b.values()))) for c, b in found] == corners
        for name in mine:
            place = back / split / name
            assert place.read_bytes() == (shapes / split / name).read_bytes()
            assert os.path.samefile(place, shapes / split / name) == (images == "link")


def test_yolo_and_back(shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Boxes to a billionth of a pixel; what YOLO has no place for is left out and counted."""
    yolo = shapes_to("yolo", shapes, tmp_path / "yolo")
    told = capsys.readouterr().out
    back = to_coco("yolo", yolo, tmp_path / "back")
    crowds = 0
    for split in SPLITS:
        mine = objects(shapes, split)
        kept = {name: [o for o in row if o[2] == (0, 0)] for name, row in mine.items()}
        crowds += sum(len(row) for row in mine.values()) - sum(len(row) for row in kept.values())
        assert_same(kept, objects(back, split), atol=1e-9)
    assert crowds > 0
    assert f"left out: {crowds} crowds and ignored objects, which YOLO has no place for" in told


def test_yolo_lines_are_the_closed_form(shapes: Path, tmp_path: Path) -> None:
    yolo = shapes_to("yolo", shapes, tmp_path / "yolo")
    truth = COCO(shapes / "annotations" / "instances_val.json")
    order = [c["id"] for c in truth.loadCats(truth.getCatIds())]
    for image in truth.loadImgs(truth.getImgIds()):
        text = (yolo / "labels" / "val" / image["file_name"]).with_suffix(".txt").read_text()
        rows = np.array([line.split() for line in text.splitlines()], float).reshape(-1, 5)
        annotations = truth.loadAnns(truth.getAnnIds(image["id"], iscrowd=False))
        boxes = np.array([a["bbox"] for a in annotations], float).reshape(-1, 4)
        centre = (boxes[:, :2] + boxes[:, 2:] / 2) / [image["width"], image["height"]]
        extent = boxes[:, 2:] / [image["width"], image["height"]]
        np.testing.assert_allclose(rows[:, 1:], np.concatenate([centre, extent], 1), rtol=0, atol=1e-12)
        assert rows[:, 0].astype(int).tolist() == [order.index(a["category_id"]) for a in annotations]


def test_coco_keeps_everything(shapes: Path, tmp_path: Path) -> None:
    back = shapes_to("coco", shapes, tmp_path / "back")
    for split in SPLITS:
        one, other = (json.loads((r / "annotations" / f"instances_{split}.json").read_text()) for r in (shapes, back))
        assert one["categories"] == other["categories"]
        assert one["images"] == other["images"]
        assert [a | {"id": 0} for a in one["annotations"]] == [a | {"id": 0} for a in other["annotations"]]
    ids = [a["id"] for s in SPLITS for a in COCO(back / "annotations" / f"instances_{s}.json").anns.values()]
    assert len(ids) == len(set(ids))


def small(root: Path, boxes: list[list[float]], **record: Any) -> Path:
    """COCO files with one image of 50 x 40 pixels per split."""
    for split in SPLITS:
        write_image(root / split / "a.png", 50, 40)
        annotations = [
            {"id": i, "image_id": 1, "category_id": 7, "bbox": box, **record} for i, box in enumerate(boxes, start=1)
        ]
        images = [{"id": 1, "file_name": "a.png", "width": 50, "height": 40}]
        content = {"images": images, "annotations": annotations, "categories": [{"id": 7, "name": "cat"}]}
        (root / f"{split}.json").write_text(json.dumps(content))
    return root


def convert(root: Path, form: str, target: Path, *more: str) -> int:
    files = [
        f"data.{s}_{k}={s}{'.json' if k == 'annotations' else ''}" for s in SPLITS for k in ("images", "annotations")
    ]
    return run(["convert", "from=custom", f"to={form}", f"source={root}", f"target={target}", *files, *more])


@pytest.mark.parametrize("form", ["voc", "yolo"])
def test_boxes_of_fractions_of_pixels(tmp_path: Path, form: str) -> None:
    """Both splits have a file of the same name, which VOC's one folder keeps apart."""
    rng = np.random.default_rng(0)
    boxes = np.concatenate([rng.uniform(0, 20, (40, 2)), rng.uniform(0.01, 20, (40, 2))], 1).tolist()
    root = small(tmp_path / "mine", boxes)
    convert(root, form, tmp_path / form)
    back = to_coco(form, tmp_path / form, tmp_path / "back")
    for split in SPLITS:
        (found,) = objects(back, split).values()
        np.testing.assert_allclose([b for _, b, _ in found], boxes, rtol=0, atol=1e-12 if form == "voc" else 1e-11)


def test_flags_of_voc(tmp_path: Path) -> None:
    root = small(tmp_path / "mine", [[1, 2, 3, 4]], ignore=1, truncated=1)
    convert(root, "voc", tmp_path / "voc")
    (path,) = (tmp_path / "voc" / "Annotations" / "val").iterdir()
    assert "<difficult>1</difficult>" in path.read_text()
    back = to_coco("voc", tmp_path / "voc", tmp_path / "back")
    (record,) = json.loads((back / "annotations" / "instances_val.json").read_text())["annotations"]
    assert (record["ignore"], record["truncated"], record["iscrowd"]) == (1, 1, 0)


def test_yolo_boxes_are_clipped(tmp_path: Path) -> None:
    root = small(tmp_path / "mine", [[-10, 30, 20, 30]])
    convert(root, "yolo", tmp_path / "yolo")
    assert (tmp_path / "yolo/labels/val/a.txt").read_text() == "0 0.1 0.875 0.2 0.25\n"


def test_images_stay_in_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = small(tmp_path / "mine", [[1, 2, 3, 4]])
    for form in ("coco", "voc"):
        convert(root, form, tmp_path / form, "images=none")
        assert not list((tmp_path / form).rglob("*.png"))
        assert f"data.train_images={root}/train" in capsys.readouterr().out
    with pytest.raises(UserError, match="images=none: YOLO finds labels beside the images"):
        convert(root, "yolo", tmp_path / "yolo", "images=none")


def test_folders_that_all_images_share_are_left_out(tmp_path: Path) -> None:
    """images/train/a/1.jpg and images/train/b/1.jpg of YOLO are a/1.jpg and b/1.jpg of COCO's train."""
    for split in SPLITS:
        for folder in ("a", "b"):
            write_image(tmp_path / "yolo" / "images" / split / folder / "1.jpg", 40, 30)
    (tmp_path / "yolo" / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [cat]\n")
    back = to_coco("yolo", tmp_path / "yolo", tmp_path / "coco")
    assert list(objects(back, "train")) == ["a/1.jpg", "b/1.jpg"]
    assert seen_size(back / "train" / "a" / "1.jpg") == (30, 40)


def test_what_to_type_next(shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shapes_to("coco", shapes, tmp_path / "my coco", "splits=[val]")
    told = capsys.readouterr().out
    assert f"python -m codetr.data check data=custom 'data.root={tmp_path}/my coco' data.val_images=val" in told
    assert "codetr.train" not in told
    shapes_to("voc", shapes, tmp_path / "voc")
    assert f"python -m codetr.train data=voc data.root={tmp_path}/voc" in capsys.readouterr().out


def test_nothing_is_overwritten(shapes: Path, tmp_path: Path) -> None:
    target = shapes_to("voc", shapes, tmp_path / "made")
    (target / "stale.txt").touch()
    with pytest.raises(UserError, match=r"target=.*made: is there already; overwrite=true"):
        shapes_to("yolo", shapes, target)
    shapes_to("yolo", shapes, target, "overwrite=true")
    assert sorted(p.name for p in target.iterdir()) == ["converted.json", "data.yaml", "images", "labels"]
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").touch()
    with pytest.raises(UserError, match=r"target=.*other: was not made by this command"):
        shapes_to("yolo", shapes, other, "overwrite=true")
    with pytest.raises(UserError, match="or holds the source"):
        to_coco("yolo", target, target, "overwrite=true")
    assert [p.name for p in other.iterdir()] == ["notes.txt"]


def test_a_failure_leaves_no_target(tmp_path: Path) -> None:
    root = small(tmp_path / "mine", [[1, 2, 3, 4]])
    (root / "train" / "a.png").unlink()
    with pytest.raises(UserError, match=r"(?s)train\.json: 1 bad record.*missing image file: image 1 \(.*a\.png\)"):
        convert(root, "voc", tmp_path / "voc")
    assert not (tmp_path / "voc").exists()
    convert(root, "voc", tmp_path / "voc", "data.on_error=skip")
    assert (tmp_path / "voc" / "ImageSets" / "Main" / "train.txt").read_text() == ""


def test_bad_boxes(tmp_path: Path) -> None:
    """Each is named; what is left when they are skipped is the good one."""
    boxes: list[Any] = [[1, 2, float("nan"), 4], [1, 2, 3], "box", [1, 2, 0, 4], [5, 4, 10, 8]]
    root = small(tmp_path / "mine", boxes)
    with pytest.raises(UserError) as raised:
        convert(root, "yolo", tmp_path / "yolo")
    assert "train.json: 4 bad records" in str(raised.value)
    for i, kind in enumerate(["box that is not 4 finite numbers"] * 3 + ["box without area"], start=1):
        assert re.search(f"x {kind}: .*annotation {i} of image 1: bbox", str(raised.value))
    convert(root, "yolo", tmp_path / "yolo", "data.on_error=skip")
    numbers = (tmp_path / "yolo/labels/train/a.txt").read_text().split()
    assert [float(n) for n in numbers] == pytest.approx([0, 0.2, 0.2, 0.2, 0.2])


def test_two_images_that_would_share_labels(tmp_path: Path) -> None:
    root = small(tmp_path / "mine", [])
    document = json.loads((root / "val.json").read_text())
    document["images"].append({"id": 2, "file_name": "a.jpg", "width": 50, "height": 40})
    (root / "val.json").write_text(json.dumps(document))
    write_image(root / "val" / "a.jpg", 50, 40)
    for form in ("voc", "yolo"):
        with pytest.raises(UserError, match=r"val: (val/)?a\.png and (val/)?a\.jpg would share one file of labels"):
            convert(root, form, tmp_path / form)
    assert convert(root, "coco", tmp_path / "coco") == 0


USE = {
    "nothing": ([], "from and to and source and target not given: .* from=voc to=coco"),
    "typo": (["sorce=x"], "sorce=x: did you mean source"),
    "format": (["from=coco", "to=kitti", "source=a", "target=b"], "to=kitti: must be one of coco, voc, yolo"),
    "images": (["from=coco", "to=voc", "source=a", "target=b", "images=move"], "images=move: must be one of link"),
    "split": (["from=coco", "to=voc", "source=a", "target=b", "splits=[test]"], r"splits=\['test'\]: there are"),
    "reader": (["from=voctor", "to=coco", "source=a", "target=b"], "Could not find 'data/voctor'"),
    "source": (["from=voc", "to=coco", "source=a", "target=b"], r"a/ImageSets/Main/train\.txt does not exist"),
    "custom": (["from=custom", "to=voc", "source=a", "target=b"], "data.train_annotations is not given; splits="),
}


@pytest.mark.parametrize("case", USE)
def test_wrong_use(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, message = USE[case]
    with pytest.raises(UserError, match=message):
        run(["convert", *arguments])
    assert not list(tmp_path.iterdir())


def test_counts_are_told(shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shapes_to("voc", shapes, tmp_path / "voc")
    told = capsys.readouterr().out
    totals = {s: Counter(len(row) for row in objects(shapes, s).values()) for s in SPLITS}
    for split, counts in totals.items():
        assert f"{split}: {counts.total()} images, {sum(k * n for k, n in counts.items())} objects" in told
    assert "masks, which VOC has no place for" in told
