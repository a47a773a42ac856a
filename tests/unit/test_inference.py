"""Files in, boxes in their pixels out: with a detector that sees one bright rectangle and nothing else."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import Resize

from codetr.data.readers.folder import find_images
from codetr.errors import UserError
from codetr.inference import Found, ImageFiles, Unreadable, Writer, detect
from codetr.postprocess import PostProcess
from codetr.types import Batch, Detections, Prediction


def paint(path: Path, size: tuple[int, int], box: tuple[int, int, int, int], orientation: int = 1) -> Path:
    """A black image of (width, height) `size` with a white box, as a camera held upright or turned writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", size)
    image.paste((255, 255, 255), box)
    if orientation == 6:  # "rotate by 90 degrees clockwise to view"
        image = image.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(path, exif=exif)
    return path


def brightest(images: Tensor, padding: Tensor) -> Prediction:
    """The bounding box of what is bright, as class 1 of 2, normalised by the image without its padding."""
    boxes = []
    for image, pad in zip(images, padding, strict=True):
        height, width = (~pad).any(1).sum(), (~pad).any(0).sum()
        rows, columns = torch.nonzero(image.float().mean(0) > 127, as_tuple=True)
        edges = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        x0, y0, x1, y1 = edges / torch.stack([width, height, width, height])
        boxes.append(torch.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0]))
    return Prediction(torch.tensor([[[-9.0, 2.0]]]).repeat(len(images), 1, 1), torch.stack(boxes)[:, None])


def find(batch: Batch) -> list[Detections]:
    return PostProcess(1, None)(brightest(batch.images, batch.padding), batch.original_sizes)


def run(paths: list[Path], num_workers: int = 0) -> list[Found | Unreadable]:
    files = ImageFiles(paths, Resize(64, max_size=100))
    options = {"device": torch.device("cpu"), "batch_size": 3, "num_workers": num_workers, "size_divisor": 32}
    return list(detect(find, files, **options))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    paint(tmp_path / "in" / "a.png", (128, 128), (32, 16, 64, 96))
    paint(tmp_path / "in" / "b.JPG", (256, 128), (64, 32, 192, 96))
    paint(tmp_path / "in" / "c.jpg", (128, 256), (32, 64, 96, 192), orientation=6)
    (tmp_path / "in" / "d.jpg").write_bytes(b"not an image")
    (tmp_path / "in" / "notes.txt").write_text("not meant")
    return tmp_path / "in"


TRUTH = {"a.png": (32, 16, 64, 96), "b.JPG": (64, 32, 192, 96), "c.jpg": (32, 64, 96, 192)}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_boxes_come_in_pixels_of_the_file_as_it_is_seen(folder: Path, num_workers: int) -> None:
    results = run(find_images(str(folder)), num_workers)
    found = {one.path.name: one for one in results if isinstance(one, Found)}
    assert found.keys() == TRUTH.keys()
    for name, one in found.items():
        boxes = one.detections.boxes_xyxy
        assert torch.allclose(boxes, torch.tensor([TRUTH[name]]).float(), atol=3.0), name  # blurred by resizing
    failed = [one for one in results if isinstance(one, Unreadable)]
    assert [one.path.name for one in failed] == ["d.jpg"]
    assert failed[0].reason


def test_a_batch_without_a_readable_image_is_no_batch(folder: Path) -> None:
    results = run([folder / "d.jpg"] * 3 + [folder / "a.png"])
    assert [type(one) for one in results] == [Unreadable] * 3 + [Found]


def test_results_are_coco_results_with_names(folder: Path, tmp_path: Path) -> None:
    paths = find_images(str(folder))
    out = tmp_path / "out"
    writer = Writer(out, paths, ["cat", "dog"], score_threshold=0.5, pictures=True)
    for one in run(paths):
        if isinstance(one, Found):
            writer.add(one)
    records = json.loads(writer.close().read_text())
    assert [(r["file_name"], r["image_id"], r["category_id"], r["category_name"]) for r in records] == [
        ("a.png", 0, 1, "dog"),
        ("b.JPG", 1, 1, "dog"),
        ("c.jpg", 2, 1, "dog"),
    ]
    for record in records:
        x0, y0, x1, y1 = TRUTH[record["file_name"]]
        assert record["bbox"] == pytest.approx([x0, y0, x1 - x0, y1 - y0], abs=4)
        assert record["score"] == pytest.approx(0.8808, abs=1e-4)  # sigmoid(2)
        with Image.open(out / record["file_name"]) as picture:
            assert max(picture.size) == 512


def test_the_threshold_holds_for_files_and_pictures(tmp_path: Path) -> None:
    path = paint(tmp_path / "in" / "a.png", (512, 512), (0, 0, 1, 1))
    boxes = torch.tensor([[10.0, 10.0, 60.0, 60.0]]).repeat(2, 1)
    found = Detections(torch.tensor([0.9, 0.2]), torch.tensor([0, 1]), boxes)
    writer = Writer(tmp_path / "out", [path], ["cat", "dog"], score_threshold=0.5, pictures=False)
    writer.add(Found(path, torch.zeros(3, 512, 512, dtype=torch.uint8), found))
    assert [r["category_name"] for r in json.loads(writer.close().read_text())] == ["cat"]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["predictions.json"]


def test_equal_names_in_two_folders_do_not_meet(tmp_path: Path) -> None:
    paths = [paint(tmp_path / "in" / side / "a.png", (64, 64), (8, 8, 56, 56)) for side in ("left", "right")]
    writer = Writer(tmp_path / "out", paths, ["cat", "dog"], score_threshold=0.5, pictures=True)
    for one in run(paths):
        assert isinstance(one, Found)
        writer.add(one)
    assert sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.png")) == [
        "left/a.png",
        "right/a.png",
    ]


def test_inputs_are_not_overwritten(folder: Path) -> None:
    with pytest.raises(UserError, match="would be overwritten"):
        Writer(folder, find_images(str(folder)), [], score_threshold=0.5, pictures=True)


def test_images_are_found_by_file_folder_and_pattern(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["a.png", "b.JPG", "c.jpg", "d.jpg"]
    assert [p.name for p in find_images(str(folder))] == names
    assert [p.name for p in find_images(f"{folder}/*.jpg")] == ["c.jpg", "d.jpg"]
    assert [p.name for p in find_images(f"{folder.parent}/**/*.png")] == ["a.png"]
    assert find_images(f"{folder}/a.png") == [folder / "a.png"]
    for nothing in (f"{folder}/*.webp", f"{folder}/absent.jpg", f"{folder}/absent"):
        with pytest.raises(UserError, match="no such file"):
            find_images(nothing)
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match="no image in this folder"):
        find_images(f"{folder}/empty")
