"""Every kind of bad input: it stops with a message that names the record, or is skipped and counted."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from coco_files import document, write

from codetr.data.checks import check_trainable, check_val_classes
from codetr.data.dataset import DetectionDataset
from codetr.data.images import UnreadableImage, looks_complete
from codetr.errors import UserError

Doc = dict[str, Any]


def good() -> Doc:
    """Four images (ids 100, 103, 106, 109) with one object each, ids 1..4."""
    doc = document(4)
    for image in doc["images"]:
        image |= {"width": 60, "height": 50}
    doc["annotations"] = [
        {"id": i + 1, "image_id": 100 + 3 * i, "category_id": 7, "bbox": [5, 6, 20, 10], "iscrowd": 0} for i in range(4)
    ]
    return doc


def break_annotation(**values: Any) -> Callable[[Doc, Path], None]:
    return lambda doc, root: doc["annotations"][1].update(values)


def truncate(doc: Doc, root: Path) -> None:
    path = root / "001.jpg"
    path.write_bytes(path.read_bytes()[:-200])


def corrupt_header(doc: Doc, root: Path) -> None:
    (root / "001.jpg").write_bytes(b"no image at all")


def other_size(doc: Doc, root: Path) -> None:
    doc["images"][1]["width"] = 61


def lose(doc: Doc, root: Path) -> None:
    (root / "001.jpg").unlink()


def repeat_image(doc: Doc, root: Path) -> None:
    doc["images"].append(dict(doc["images"][1]))


def forget_width(doc: Doc, root: Path) -> None:
    del doc["images"][1]["width"]


def forget_box(doc: Doc, root: Path) -> None:
    del doc["annotations"][1]["bbox"]


# What is broken -> (what the message says, images and objects that are left).
CASES: dict[str, tuple[Callable[[Doc, Path], None], str, int, int]] = {
    "missing image": (lose, r"missing image file: image 103 \(.*001\.jpg\)", 3, 3),
    "truncated": (truncate, r"unreadable image file: image 103 \(.*001\.jpg cannot be decoded", 3, 3),
    "no image": (corrupt_header, r"unreadable image file: image 103 \(.*001\.jpg cannot be decoded", 3, 3),
    "size": (other_size, r"image 103 \(.*001\.jpg holds 60x50 pixels, but the annotations say 61x50", 3, 3),
    "image id": (repeat_image, r"duplicate image id: image 103 \(001\.jpg\)", 4, 4),
    "no width": (forget_width, r"bad image record: image 103", 3, 3),
    "id": (break_annotation(id=1), "duplicate annotation id: annotation 1 ", 4, 3),
    "image": (break_annotation(image_id=5), r"unknown image: annotation 2 \(image 5\)", 4, 3),
    "category": (break_annotation(category_id=5), r"unknown category id: annotation 2 \(category 5\)", 4, 3),
    "nan": (break_annotation(bbox=[1, float("nan"), 3, 4]), "4 finite numbers: annotation 2 of image 103", 4, 3),
    "inf": (break_annotation(bbox=[1, 2, float("inf"), 4]), "4 finite numbers: annotation 2 of image 103", 4, 3),
    "three": (break_annotation(bbox=[1, 2, 3]), r"4 finite numbers: .*bbox \[1, 2, 3\]", 4, 3),
    "no box": (forget_box, "4 finite numbers: annotation 2 of image 103: bbox None", 4, 3),
    "inverted": (break_annotation(bbox=[9, 9, -3, 4]), r"inverted box: annotation 2 of image 103: bbox \[9", 4, 3),
    "no area": (break_annotation(bbox=[9, 9, 3, 0]), "without area: annotation 2 of image 103", 4, 3),
    "outside": (break_annotation(bbox=[60, 9, 3, 4]), "box outside its image: annotation 2 of image 103", 4, 3),
    "above": (break_annotation(bbox=[9, -4, 3, 4]), "box outside its image: annotation 2 of image 103", 4, 3),
}


def broken(folder: Path, breaks: Callable[[Doc, Path], None]) -> tuple[Path, Path]:
    doc = good()
    root, source = write(folder, doc)
    breaks(doc, root)
    source.write_text(json.dumps(doc))
    return root, source


@pytest.mark.parametrize("case", CASES)
def test_a_bad_record_stops_with_its_name(tmp_path: Path, case: str) -> None:
    breaks, message, *_ = CASES[case]
    files = broken(tmp_path, breaks)
    with pytest.raises(UserError, match=rf"(?s)train\.json: 1 bad record\n.*1 x .*{message}.*data\.on_error=skip"):
        DetectionDataset(*files)


@pytest.mark.parametrize("case", CASES)
def test_a_bad_record_is_skipped_and_counted(tmp_path: Path, case: str, caplog: pytest.LogCaptureFixture) -> None:
    breaks, _, images, objects = CASES[case]
    files = broken(tmp_path, breaks)
    with caplog.at_level(logging.WARNING):
        dataset = DetectionDataset(*files, on_error="skip")
    assert [len(dataset), sum(dataset.label_counts.values())] == [images, objects]
    assert sum(dataset.report.errors.values()) == 1
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "1 bad records dropped" in caplog.text
    for index in range(len(dataset)):
        assert dataset[index].image_id == dataset.image_ids[index]


def test_good_data_says_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = DetectionDataset(*write(tmp_path, good()))
    assert dataset.report.errors == {}
    assert not caplog.records


def test_the_message_shows_the_first_few_of_each_kind(tmp_path: Path) -> None:
    doc = good()
    doc["annotations"] = [dict(a, id=10 * a["id"] + k) for a in doc["annotations"] for k in range(3)]
    for annotation in doc["annotations"][:7]:
        annotation["bbox"] = [0, 0, 0, 0]
    doc["annotations"][8]["category_id"] = 99
    with pytest.raises(UserError) as caught:
        DetectionDataset(*write(tmp_path, doc))
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("train.json: 8 bad records")
    assert lines[1].startswith("  1 x unknown category id: annotation 32 (category 99) (add the category")
    assert lines[2].startswith("  7 x box without area: annotation 10 of image 100")
    assert lines[2].count("annotation ") == 3
    assert ", ... (" in lines[2]
    assert len(lines) == 4


def test_structural_faults_stop_whatever_the_policy(tmp_path: Path) -> None:
    root, source = write(tmp_path, good())

    def read(text: str | None = None, **changes: Any) -> None:
        if text is not None:
            source.write_text(text)
        DetectionDataset(**{"root": root, "annotations": source, "on_error": "skip"} | changes)

    with pytest.raises(UserError, match=r"nothing\.json does not exist"):
        read(annotations=tmp_path / "nothing.json")
    with pytest.raises(UserError, match=r"image folder .*nowhere does not exist"):
        read(root=tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"cannot be read: Is a directory"):
        read(annotations=tmp_path)
    with pytest.raises(UserError, match=r"train\.json is not JSON \(Expecting .* line 1"):
        read('{"images": [')
    source.write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(UserError, match=r"train\.json is not JSON"):
        read()
    with pytest.raises(UserError, match=r"not a COCO instances file: no list of objects under images, anno"):
        read("[1, 2]")
    with pytest.raises(UserError, match=r"no list of objects under annotations"):
        read(json.dumps(good() | {"annotations": {}}))
    with pytest.raises(UserError, match=r"names no usable image"):
        read(json.dumps(good() | {"images": [], "annotations": []}))
    with pytest.raises(UserError, match=r"category name \['disc'\] appears more than once"):
        read(json.dumps(good() | {"categories": [{"id": 1, "name": "disc"}, {"id": 2, "name": "disc"}]}))
    with pytest.raises(UserError, match=r"each category needs an integer `id` and a `name`"):
        read(json.dumps(good() | {"categories": [{"id": 1}]}))


def test_class_lists(tmp_path: Path) -> None:
    files = write(tmp_path, good())
    with pytest.raises(UserError, match=r"data\.classes names \['cat'\], but .*train\.json only has \['disc'"):
        DetectionDataset(*files, classes=["disc", "cat"])
    with pytest.raises(UserError, match=r"data\.classes names \['disc'\] more than once"):
        DetectionDataset(*files, classes=["disc", "disc"])
    check_trainable(DetectionDataset(*files, classes=["disc"]).label_counts, files[1])
    with pytest.raises(UserError, match=r"no training label is left in .*train\.json: .*\['star', 'square'\]"):
        check_trainable(DetectionDataset(*files, classes=["star", "square"]).label_counts, files[1])


def test_only_objects_of_classes_that_are_not_trained_stop() -> None:
    check_val_classes(["a", "b"], {"a": 3}, {"root": 0}, Path("val.json"))
    with pytest.raises(UserError, match=r"val\.json has objects of \['c'\], .*none of \['b'\]:.*data\.classes=\[a,b\]"):
        check_val_classes(["a", "b"], {"a": 3}, {"c": 1, "d": 0}, Path("val.json"))


def test_what_each_verification_finds(tmp_path: Path) -> None:
    """A file with whole ends and a broken middle passes all but decoding; a truncated one passes `exists` only."""
    doc = good()
    doc["images"][1]["file_name"] = "001.png"
    root, source = write(tmp_path, doc)
    data = bytearray((root / "001.png").read_bytes())
    data[len(data) // 2] ^= 255
    (root / "001.png").write_bytes(data)
    DetectionDataset(root, source, verify="exists")
    DetectionDataset(root, source, verify="complete")
    with pytest.raises(UserError, match=r"image 103 \(.*001\.png cannot be decoded"):
        DetectionDataset(root, source, verify="decode")
    (root / "000.jpg").write_bytes((root / "000.jpg").read_bytes()[:-100])
    dataset = DetectionDataset(root, source, verify="exists")
    with pytest.raises(UnreadableImage, match=r"000\.jpg cannot be decoded"):
        dataset[0]


def test_a_whole_file_with_bytes_behind_its_end_is_complete(tmp_path: Path) -> None:
    root, _ = write(tmp_path, good())
    path = root / "000.jpg"
    path.write_bytes(path.read_bytes() + bytes(100))
    assert looks_complete(path, (50, 60))
    assert not looks_complete(path, (60, 50))  # only a photograph that says so is turned
    assert not looks_complete(path, (50, 61))


def test_files_in_subfolders_are_found(tmp_path: Path) -> None:
    doc = good()
    for image in doc["images"]:
        image["file_name"] = f"a/b/{image['file_name']}"
    root, source = write(tmp_path, doc)
    (root / "a/b/002.jpg").unlink()
    dataset = DetectionDataset(root, source, on_error="skip")
    assert dataset.image_ids.tolist() == [100, 103, 109]


def test_numbers_as_text_train_what_they_mean(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Every column of the same file with numbers and with texts; `bool("0")` is true."""
    doc = document(6)
    plain = DetectionDataset(*write(tmp_path, doc, "plain"))
    for record in doc["annotations"]:
        record.update({k: str(record[k]) for k in ("iscrowd", "image_id", "category_id", "area")})
        record["bbox"] = [str(v) for v in record["bbox"]]
    for image in doc["images"]:
        image["width"] = float(image["width"])
    (tmp_path / "text.json").write_text(json.dumps(doc))
    with caplog.at_level(logging.WARNING):
        text = DetectionDataset(tmp_path / "plain", tmp_path / "text.json")
    assert "value of another type" in caplog.text
    for i in range(len(plain)):
        expected, found = plain.truth(i), text.truth(i)
        assert all(found[key].tolist() == expected[key].tolist() for key in expected)
    assert any(plain.truth(i)["iscrowd"].any() for i in range(len(plain)))
