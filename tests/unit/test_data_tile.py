"""`codetr data tile`: what a tile says of its objects is what one sees in it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from codetr.data.__main__ import run
from codetr.data.tiling import Tile, cut
from codetr.errors import UserError
from codetr.trees import PLACES, prepare

SIDE, HEIGHT, WIDTH = 64, 150, 190


def paint(folder: Path, masks: bool) -> dict[int, np.ndarray]:
    """An image of rectangles or of triangles with a colour each, none over another, as a set with two equal splits;
    returns the places of each object [H, W]."""
    rng = np.random.default_rng(3)
    canvas = np.zeros((HEIGHT, WIDTH), np.uint8)
    annotations: list[dict[str, Any]] = []
    while len(annotations) < 25:
        w, h = rng.integers(4, 40, 2).tolist()
        x, y = int(rng.integers(0, WIDTH - w + 1)), int(rng.integers(0, HEIGHT - h + 1))
        outline = [x, y, x + w, y, x, y + h] if masks else [x, y, x + w, y, x + w, y + h, x, y + h]
        place = coco_mask.decode(coco_mask.frPyObjects([outline], HEIGHT, WIDTH))[:, :, 0] > 0
        if canvas[y : y + h, x : x + w].any() or not place.any():
            continue
        canvas[place] = number = len(annotations) + 1
        rows, columns = place.nonzero()
        left, top = int(columns.min()), int(rows.min())
        box = [left, top, int(columns.max()) + 1 - left, int(rows.max()) + 1 - top]
        record = {"id": number, "image_id": 1, "category_id": 5, "bbox": box, "area": int(place.sum()), "iscrowd": 0}
        annotations.append(record | ({"segmentation": [outline]} if masks else {}))
    annotations[3]["iscrowd"] = 1
    folder.mkdir()
    Image.fromarray(np.stack([canvas] * 3, -1)).save(folder / "a.png")
    images = [{"id": 1, "file_name": "a.png", "height": HEIGHT, "width": WIDTH}]
    document = {"images": images, "annotations": annotations, "categories": [{"id": 5, "name": "thing"}]}
    (folder / "a.json").write_text(json.dumps(document))
    return {record["id"]: canvas == record["id"] for record in annotations}


def tile(source: Path, target: Path, *more: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The documents of training and validation."""
    data = [f"data.{split}_annotations=a.json" for split in ("train", "val")]
    given = ["from=custom", f"source={source}", f"target={target}", f"size={SIDE}", *data, "data.on_error=skip", *more]
    assert run(["tile", *given]) == 0
    files = (target / "annotations" / f"instances_{split}.json" for split in ("train", "val"))
    return tuple(json.loads(file.read_text()) for file in files)


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("visible", [0.0, 0.4, 1.0])
def test_boxes_are_around_what_a_tile_shows(tmp_path: Path, masks: bool, visible: float) -> None:
    places = paint(tmp_path / "set", masks)
    more = ["data.masks=true"] if masks else []
    tiles, _ = tile(tmp_path / "set", tmp_path / "cut", f"visible={visible}", *more)
    assert len(tiles["images"]) == 3 * 4
    whole = np.asarray(Image.open(tmp_path / "set" / "a.png"))[..., 0]
    shown = 0
    for image in tiles["images"]:
        pixels = np.asarray(Image.open(tmp_path / "cut" / "train" / image["file_name"]))[..., 0]
        assert pixels.shape == (image["height"], image["width"]) == (SIDE, SIDE)
        name, x, y = image["tile"]
        assert name == "a.png"
        np.testing.assert_array_equal(pixels, whole[y : y + SIDE, x : x + SIDE])
        own = {str(a["bbox"]): a for a in tiles["annotations"] if a["image_id"] == image["id"]}
        seen = [colour for colour in np.unique(pixels) if colour]
        assert len(own) == len(seen)
        for colour in seen:
            rows, columns = (pixels == colour).nonzero()
            left, top = int(columns.min()), int(rows.min())
            record = own[str([left, top, int(columns.max()) + 1 - left, int(rows.max()) + 1 - top])]
            share = len(rows) / places[int(colour)].sum()
            assert record["area"] == len(rows)
            assert record["ignore"] == (share < visible and not record["iscrowd"])
            if masks:
                np.testing.assert_array_equal(coco_mask.decode(record["segmentation"]) > 0, pixels == colour)
            shown += 1
    assert shown == len(tiles["annotations"])
    assert sum(a["iscrowd"] for a in tiles["annotations"]) >= 1
    assert {a["ignore"] for a in tiles["annotations"]} == ({0} if visible == 0 else {0, 1})


def test_whole_splits_stay_as_they_are(tmp_path: Path) -> None:
    paint(tmp_path / "set", masks=False)
    before = json.loads((tmp_path / "set" / "a.json").read_text())
    train, val = tile(tmp_path / "set", tmp_path / "cut")
    assert [a["bbox"] for a in val["annotations"]] == [a["bbox"] for a in before["annotations"]]
    assert (tmp_path / "cut" / "val" / "a.png").read_bytes() == (tmp_path / "set" / "a.png").read_bytes()
    assert len(train["images"]) > len(val["images"]) == 1
    _, val = tile(tmp_path / "set", tmp_path / "all", "whole=[]")
    assert [i["tile"] for i in val["images"]] == [i["tile"] for i in train["images"]]


def test_the_set_can_be_checked_and_cut_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paint(tmp_path / "set", masks=False)
    tile(tmp_path / "set", tmp_path / "cut")
    printed = capsys.readouterr().out
    assert "objects that no tile shows whole" in printed
    check = next(line for line in printed.splitlines() if "codetr.data check" in line).split()[4:]
    assert run(["check", *check, "page=null"]) == 0
    with pytest.raises(UserError, match="overwrite=true"):
        tile(tmp_path / "set", tmp_path / "cut")
    tiles, _ = tile(tmp_path / "set", tmp_path / "cut", "overwrite=true", "size=200")
    assert len(tiles["images"]) == 1


@pytest.mark.parametrize("wrong", ["size=3", "size=big", "overlap=0.9", "visible=-1", "sise=3", "splits=[test]"])
def test_options_that_are_wrong_are_named(tmp_path: Path, wrong: str) -> None:
    paint(tmp_path / "set", masks=False)
    with pytest.raises(UserError, match=wrong.partition("=")[0]):
        tile(tmp_path / "set", tmp_path / "cut", wrong)


def test_an_object_beside_a_tile_is_none_of_its() -> None:
    record = {"bbox": [10.0, 10.0, 5.0, 5.0], "category_id": 1}
    assert cut(record, None, Tile(15, 0, 10, 30), 0.4) is None
    part = cut(record, None, Tile(12, 0, 10, 30), 0.4)
    assert part is not None
    assert (part["bbox"], part["area"], part["ignore"]) == ([0, 10, 3, 5], 15, 0)


@pytest.mark.skipif(importlib.util.find_spec("deepforest") is None, reason="the package deepforest is not installed")
def test_the_trees_are_all_there(tmp_path: Path) -> None:
    prepare(str(tmp_path / "trees"), 400, 0.25, 0.4)
    train, val = (
        json.loads((tmp_path / "trees" / "annotations" / f"instances_{split}.json").read_text()) for split in PLACES
    )
    assert (len(val["images"]), len(val["annotations"])) == (1, 279)
    assert len({tuple(i["tile"][:1]) for i in train["images"]}) == 3
    assert {c["name"] for c in val["categories"]} == {"Tree"}
    assert len({a["id"] for a in train["annotations"]}) == len(train["annotations"]) > 574 + 61 + 37
    before = (tmp_path / "trees" / "annotations" / "instances_train.json").stat().st_mtime_ns
    prepare(str(tmp_path / "trees"), 400, 0.25, 0.4)
    assert (tmp_path / "trees" / "annotations" / "instances_train.json").stat().st_mtime_ns == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").write_text("x")
    with pytest.raises(UserError, match="mine"):
        prepare(str(tmp_path / "mine"), 400, 0.25, 0.4)
