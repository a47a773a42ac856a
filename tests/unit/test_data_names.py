"""File names as tools write them: the one file that is meant is found, and no other."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from coco_files import write_image

from codetr.data.commands import convert
from codetr.data.dataset import DetectionDataset
from codetr.data.names import find_misspelt
from codetr.errors import UserError

# Name in the annotations -> the file that it means, below a folder mine/train.
FOUND = {
    "My%20cat%2B1.jpg": "My cat+1.jpg",
    "a\\b.jpg": "a/b.jpg",
    "C:\\Users\\me\\a\\b.jpg": "a/b.jpg",
    "/data/local/a/b.jpg": "a/b.jpg",
    "../../label-studio/media/upload/1/a/b.jpg": "a/b.jpg",
    "train/a/b.jpg": "a/b.jpg",
    "A/B.JPG": "a/b.jpg",
    "./a/B.jpg": "a/b.jpg",
}
# Names of which a file could be guessed, wrongly.
LEFT = ("val/a/b.jpg", "b.jpg", "a/b.png", "c/b.jpg", "twice.jpg", "/x/y/", "", "..")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "mine" / "train"
    for name in ("My cat+1.jpg", "a/b.jpg", "TWICE.jpg", "Twice.jpg"):
        write_image(folder / name, 60, 50)
    return folder


@pytest.mark.parametrize("name", FOUND)
def test_the_file_that_is_meant(root: Path, name: str) -> None:
    assert find_misspelt(root, {7: name}) == {7: FOUND[name]}
    assert find_misspelt(root, {7: name, 8: name}) == {}
    assert find_misspelt(root, {7: name}, taken=[FOUND[name]]) == {}


@pytest.mark.parametrize("name", LEFT)
def test_names_that_mean_no_one_file(root: Path, name: str) -> None:
    assert find_misspelt(root, {7: name}) == {}


def document(name: str) -> dict[str, Any]:
    return {
        "images": [{"id": 1, "file_name": name, "width": 60, "height": 50}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [5, 6, 20, 10]}],
        "categories": [{"id": 1, "name": "cat"}],
    }


def test_training_and_convert_find_it_and_say_so(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = root.parent / "train.json"
    source.write_text(json.dumps(document("C:\\me\\My%20cat%2B1.jpg")))
    with caplog.at_level(logging.WARNING):
        dataset = DetectionDataset(root, source)
    assert dataset.path(0) == root / "My cat+1.jpg"
    assert dataset[0].labels.tolist() == [0]
    assert caplog.text.count("image file of another spelling: image 1") == 1
    own = [f"source={root.parent}", f"target={tmp_path}/made", "data.train_annotations=train.json", "splits=[train]"]
    convert.main(["from=custom", "to=coco", "data.train_images=train", *own])
    made = json.loads((tmp_path / "made/annotations/instances_train.json").read_text())
    assert [i["file_name"] for i in made["images"]] == ["My cat+1.jpg"]
    assert (tmp_path / "made/train/My cat+1.jpg").is_file()


def test_what_would_mend_it_is_said(root: Path) -> None:
    source = root.parent / "train.json"
    for name, advice in (("D:\\x\\none.jpg", "the path is of another place"), ("no%20ne.jpg", "tools write % for")):
        source.write_text(json.dumps(document(name)))
        with pytest.raises(UserError, match=advice):
            DetectionDataset(root, source)
