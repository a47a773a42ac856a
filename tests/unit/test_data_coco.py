"""The reader against pycocotools, and image files of every kind against Pillow."""

import contextlib
import io
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from coco_files import CATEGORIES, document, write, write_image
from PIL import Image, ImageOps
from pycocotools.coco import COCO

from codetr.data.dataset import DetectionDataset
from codetr.data.images import UnreadableImage, read_image


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    return write(tmp_path, document(8))


def test_truth_and_targets_are_what_pycocotools_reads(files: tuple[Path, Path]) -> None:
    dataset = DetectionDataset(*files)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(files[1])
    assert dataset.class_names == ("disc", "square", "star")
    assert dataset.category_ids == (7, 3, 12)
    assert len(dataset) == len(coco.imgs)
    crowds = 0
    for index in range(len(dataset)):
        sample = dataset[index]
        truth = coco.imgToAnns[sample.image_id]
        crowds += sum(a["iscrowd"] for a in truth)
        x, y, w, h = np.array([a["bbox"] for a in truth]).reshape(-1, 4).T
        np.testing.assert_array_equal(sample.truth["boxes"], np.stack([x, y, x + w, y + h], 1))
        assert sample.truth["area"].tolist() == [a["area"] for a in truth]
        assert sample.truth["iscrowd"].tolist() == [bool(a["iscrowd"]) for a in truth]
        expected = [dataset.category_ids.index(a["category_id"]) for a in truth]
        assert sample.truth["labels"].tolist() == expected
        training = [label for label, a in zip(expected, truth, strict=True) if not a["iscrowd"]]
        assert sample.labels.tolist() == training
        assert len(sample.boxes) == len(training)
        image = coco.imgs[sample.image_id]
        assert sample.scale == (1, 1)
        assert sample.file_size == tuple(sample.image.shape[-2:]) == (image["height"], image["width"])
    assert crowds > 0
    counts = {c["name"]: 0 for c in CATEGORIES}
    for a in coco.anns.values():
        counts[coco.cats[a["category_id"]]["name"]] += not a["iscrowd"]
    assert dataset.label_counts == counts


def test_classes_select_and_order(files: tuple[Path, Path]) -> None:
    every, some = DetectionDataset(*files), DetectionDataset(*files, classes=["star", "disc"])
    assert some.category_ids == (12, 7)
    for index in range(len(every)):
        labels = every[index].labels
        kept = labels != 1
        assert some[index].labels.tolist() == [{2: 0, 0: 1}[v] for v in labels[kept].tolist()]
        torch.testing.assert_close(torch.as_tensor(some[index].boxes), torch.as_tensor(every[index].boxes)[kept])


def test_iscrowd_and_area_may_be_missing(tmp_path: Path) -> None:
    doc = document()
    for annotation in doc["annotations"]:
        del annotation["iscrowd"], annotation["area"]
    dataset = DetectionDataset(*write(tmp_path, doc))
    for index in range(len(dataset)):
        truth = dataset.truth(index)
        assert not truth["iscrowd"].any()
        x1, y1, x2, y2 = truth["boxes"].T
        torch.testing.assert_close(truth["area"], (x2 - x1) * (y2 - y1))


def test_a_box_that_reaches_out_is_clipped_for_training_only(tmp_path: Path) -> None:
    doc = document(1)
    doc["images"][0] |= {"width": 50, "height": 40}
    doc["annotations"][0] |= {"bbox": [-5, 30, 20, 30], "iscrowd": 0}
    dataset = DetectionDataset(*write(tmp_path, doc))
    assert dataset[0].boxes.tolist() == [[0, 30, 15, 40]]
    assert dataset[0].truth["boxes"].tolist() == [[-5, 30, 15, 60]]
    assert not dataset.report.errors
    assert "1 x box that reaches out of its image: annotation 1000 of image 100" in str(dataset.report)


def test_a_data_set_travels_to_workers_as_a_few_arrays(files: tuple[Path, Path]) -> None:
    dataset = DetectionDataset(*files)
    copy = pickle.loads(pickle.dumps(dataset))
    torch.testing.assert_close(copy.truth(3), dataset.truth(3))
    assert not any(isinstance(v, (list, dict)) for v in vars(dataset).values())


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "LA", "I;16"])
def test_png_of_any_mode_reads_as_pillow_does(tmp_path: Path, mode: str) -> None:
    write_image(tmp_path / "base.png", 33, 21)
    with Image.open(tmp_path / "base.png") as base:
        if mode == "I;16":
            Image.fromarray(np.asarray(base.convert("L")).astype(np.uint16) * 257).save(tmp_path / "a.png")
            expected = base.convert("L").convert("RGB")
        else:
            base.convert(mode).save(tmp_path / "a.png")
            expected = base.convert(mode).convert("RGB")
    image = read_image(tmp_path / "a.png", (21, 33))
    assert image.dtype == torch.uint8
    np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), np.asarray(expected))


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_jpeg_of_any_mode_reads_as_pillow_does(tmp_path: Path, mode: str) -> None:
    write_image(tmp_path / "base.png", 33, 21)
    with Image.open(tmp_path / "base.png") as base:
        base.convert(mode).save(tmp_path / "a.jpg", quality=95)
    with Image.open(tmp_path / "a.jpg") as saved:
        expected = np.asarray(saved.convert("RGB")).astype(int)
    image = read_image(tmp_path / "a.jpg", (21, 33)).permute(1, 2, 0).numpy().astype(int)
    assert np.abs(image - expected).max() <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    write_image(tmp_path / "a.png", 33, 21, exif=exif)
    with Image.open(tmp_path / "a.png") as saved:
        expected = np.asarray(ImageOps.exif_transpose(saved).convert("RGB"))
    image = read_image(tmp_path / "a.png", expected.shape[:2])
    np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), expected)


def test_annotations_of_the_stored_raster_win_over_exif(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    write_image(tmp_path / "a.png", 33, 21, exif=exif)
    with Image.open(tmp_path / "a.png") as saved:
        expected = np.asarray(saved.convert("RGB"))
    image = read_image(tmp_path / "a.png", (21, 33))
    np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), expected)


def test_another_size_than_annotated_is_an_error(tmp_path: Path) -> None:
    write_image(tmp_path / "a.jpg", 33, 21)
    with pytest.raises(UnreadableImage, match=r"a\.jpg holds 33x21 pixels, but the annotations say 40x21"):
        read_image(tmp_path / "a.jpg", (21, 40))


def test_areas_of_wrong_type_fall_back_to_the_box(tmp_path: Path) -> None:
    doc = document(2)
    doc["annotations"][0]["area"] = None
    source = write(tmp_path, doc)
    assert json.loads(source[1].read_text())["annotations"][0]["area"] is None
    areas = torch.cat([DetectionDataset(*source).truth(i)["area"] for i in range(2)])
    assert areas.isfinite().all()
