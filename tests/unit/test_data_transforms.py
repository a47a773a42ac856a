"""Painted objects tell where they went; random numbers tell what they depend on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coco_files import CATEGORIES, document, write
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from codetr.data.collate import collate
from codetr.data.dataset import DetectionDataset, Sample
from codetr.data.geometry import RandomSizeCrop
from codetr.data.images import UnreadableImage
from codetr.data.transforms import TransformedDataset, fit_canvas, large_scale_jitter
from codetr.postprocess import PostProcess
from codetr.types import Prediction

ROUNDED = 5.5e-4  # pixels: half a unit of the third decimal, to which sizes are rounded, and float32's share

# The second resize never enlarges, so that the rounding of the first stays below half a pixel.
RECIPE = v2.Compose(
    [
        v2.RandomHorizontalFlip(0.5),
        v2.RandomApply([v2.RandomShortestSize([64, 80]), RandomSizeCrop(64, 90)], p=0.5),
        v2.RandomShortestSize([32, 48, 64], max_size=90),
    ]
)


@pytest.fixture
def painted(tmp_path: Path) -> DetectionDataset:
    """Objects of label 0, 1, 2 fill the red, green and blue channel of their box, on black."""
    rng = np.random.default_rng(3)
    doc: dict[str, Any] = {"images": [], "annotations": [], "categories": CATEGORIES}
    root = tmp_path / "painted"
    root.mkdir()
    for i in range(12):
        height, width = rng.integers(50, 110, 2).tolist()
        pixels = np.zeros((height, width, 3), np.uint8)
        for label, category in enumerate(CATEGORIES):
            w, h = rng.integers(10, 40, 2).tolist()
            x, y = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
            if label == 2:  # An object that covers the image: its box must stay on the border.
                x, y, w, h = 0, 0, width, height
            pixels[y : y + h, x : x + w, label] = 255
            doc["annotations"].append({"image_id": i, "category_id": category["id"], "bbox": [x, y, w, h]})
        doc["images"].append({"id": i, "file_name": f"{i}.png", "width": width, "height": height})
    _, source = write(tmp_path, doc, "painted")
    for i, image in enumerate(doc["images"]):
        canvas = np.zeros((image["height"], image["width"], 3), np.uint8)
        for label, annotation in enumerate(doc["annotations"][3 * i : 3 * i + 3]):
            x, y, w, h = annotation["bbox"]
            canvas[y : y + h, x : x + w, label] = 255
        Image.fromarray(canvas).save(root / image["file_name"])
    return DetectionDataset(root, source)


def extent(channel: Tensor) -> list[int] | None:
    """xyxy of what is painted, or None."""
    rows, columns = (channel > 127).nonzero(as_tuple=True)
    if not len(rows):
        return None
    return [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]


def test_boxes_stay_on_their_objects_to_a_pixel(painted: DetectionDataset) -> None:
    dataset = TransformedDataset(painted, RECIPE, seed=1, unreadable="stop")
    removed = 0
    for epoch in range(20):
        for index in range(len(dataset)):
            sample = dataset[epoch, index]
            assert sample.image.dtype == torch.uint8
            height, width = sample.image.shape[-2:]
            assert max(height, width) <= 90
            boxes = dict(zip(sample.labels.tolist(), sample.boxes.tolist(), strict=True))
            assert 2 in boxes
            for label in range(3):
                where = extent(sample.image[label])
                if label in boxes:
                    x1, y1, x2, y2 = boxes[label]
                    assert 0 <= x1 < x2 <= width
                    assert 0 <= y1 < y2 <= height
                    if where is None:
                        assert min(x2 - x1, y2 - y1) < 2
                    else:
                        assert np.abs(np.subtract(where, boxes[label])).max() <= 1
                else:
                    removed += 1
                    assert where is None or min(where[2] - where[0], where[3] - where[1]) <= 2
    assert removed > 10


def test_truth_stays_in_pixels_of_the_file(painted: DetectionDataset) -> None:
    dataset = TransformedDataset(painted, RECIPE, seed=1, unreadable="stop")
    for index in range(len(dataset)):
        torch.testing.assert_close(dataset[3, index].truth, painted.truth(index))


def test_the_scale_is_that_of_the_objects(painted: DetectionDataset) -> None:
    """Flips leave it alone. Behind crops too, a box has the size in the file that it had, unless cut."""
    whole = v2.Compose([v2.RandomHorizontalFlip(0.5), v2.RandomShortestSize([33, 47, 61], max_size=70)])
    for transform in (whole, RECIPE, large_scale_jitter(80, (0.3, 2.0), 0.5, 114)):
        dataset = TransformedDataset(painted, transform, seed=1, unreadable="stop")
        uncut = 0
        for epoch in range(3):
            for index in range(len(dataset)):
                sample, truth = dataset[epoch, index], painted.truth(index)["boxes"]
                height, width = sample.image.shape[-2:]
                if transform is whole:
                    rows, columns = painted.sizes[index].tolist()
                    assert sample.scale == (height / rows, width / columns)
                scale = 1 / torch.tensor(sample.scale).flip(0)
                for label, box in zip(sample.labels.tolist(), sample.boxes, strict=True):
                    inside = (box[:2] > 0).all() and (box[2:] < torch.tensor([width, height])).all()
                    if inside:
                        uncut += 1
                        file = (truth[label, 2:] - truth[label, :2]).float()
                        torch.testing.assert_close((box[2:] - box[:2]) * scale, file, atol=ROUNDED, rtol=0)
        assert uncut > 20


def same(a: Sample, b: Sample) -> bool:
    return a.image.shape == b.image.shape and torch.equal(a.image, b.image) and torch.equal(a.boxes, b.boxes)


def test_randomness_is_a_function_of_seed_epoch_and_index(painted: DetectionDataset) -> None:
    def dataset(seed: int) -> TransformedDataset:
        return TransformedDataset(painted, RECIPE, seed, unreadable="stop")

    reference = {(e, i): dataset(1)[e, i] for e in range(6) for i in range(3)}
    other = dataset(1)
    for key in reversed(reference):
        torch.rand(7)
        assert same(other[key], reference[key])
    for i in range(3):
        assert any(not same(reference[0, i], reference[e, i]) for e in range(1, 6))
        assert any(not same(dataset(2)[e, i], reference[e, i]) for e in range(6))


def test_the_global_random_state_is_left_alone(painted: DetectionDataset) -> None:
    dataset = TransformedDataset(painted, RECIPE, 1, unreadable="stop")
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    dataset[0, 0]
    torch.testing.assert_close(torch.rand(3), expected)


def test_both_branches_and_all_scales_occur(painted: DetectionDataset) -> None:
    """Of 240 draws: half flipped, and each short side a third, within five standard deviations."""

    def share(transform: Callable, happened: Callable[[Sample, int], bool]) -> float:
        dataset = TransformedDataset(painted, transform, 5, unreadable="stop")
        return np.mean([happened(dataset[e, i], i) for e in range(20) for i in range(12)]).item()

    flipped = share(
        v2.RandomHorizontalFlip(0.5), lambda s, i: not torch.equal(s.image, torch.as_tensor(painted[i].image))
    )
    assert abs(flipped - 1 / 2) < 5 * (1 / 2 * 1 / 2 / 240) ** 0.5
    for side in (30, 40, 50):
        scaled = share(v2.RandomShortestSize([30, 40, 50]), lambda s, i, side=side: min(s.image.shape[1:]) == side)
        assert abs(scaled - 1 / 3) < 5 * (1 / 3 * 2 / 3 / 240) ** 0.5


def test_crop_draws_height_and_width_from_the_whole_range() -> None:
    image = torch.zeros(3, 25, 60, dtype=torch.uint8)
    shapes = {tuple(RandomSizeCrop(20, 40)(image).shape[1:]) for _ in range(3000)}
    assert {h for h, _ in shapes} == set(range(20, 26))
    assert {w for _, w in shapes} == set(range(20, 41))
    assert RandomSizeCrop(100, 200)(image).shape == image.shape


def test_crop_reaches_every_place() -> None:
    image = torch.arange(10).expand(1, 8, 10)
    lefts = {int(RandomSizeCrop(4, 4)(image)[0, 0, 0]) for _ in range(300)}
    assert lefts == set(range(7))


def test_an_unreadable_image_is_replaced_by_the_next_or_named(tmp_path: Path) -> None:
    root, source = write(tmp_path, document(4))
    for name in ("001.jpg", "002.jpg", "003.jpg"):
        (root / name).write_bytes(b"broken")
    reader = DetectionDataset(root, source, verify="exists")
    replaced = TransformedDataset(reader, v2.Identity(), 0, unreadable="next")
    assert [replaced[0, i].image_id for i in range(4)] == [100, 100, 100, 100]
    strict = TransformedDataset(reader, v2.Identity(), 0, unreadable="stop")
    with pytest.raises(UnreadableImage, match=r"002\.jpg cannot be decoded"):
        strict[0, 2]
    (root / "000.jpg").write_bytes(b"broken")
    with pytest.raises(UnreadableImage, match="none of the 4 images"):
        replaced[0, 1]


@pytest.fixture
def thin(tmp_path: Path) -> DetectionDataset:
    """Images of 10 x 20,000, 1 x 200 and 64 x 64 pixels; a white object fills the second quarter of each."""
    doc: dict[str, Any] = {"images": [], "annotations": [], "categories": CATEGORIES}
    pictures = []
    for i, (height, width) in enumerate(((20000, 10), (1, 200), (64, 64))):
        long = (height, width).index(max(height, width))
        box = [0, 0, width, height]
        box[1 - long], box[3 - long] = max(height, width) // 4, max(height, width) // 4
        pixels = np.zeros((height, width, 3), np.uint8)
        pixels[box[1] : box[1] + box[3], box[0] : box[0] + box[2]] = 255
        pictures.append(Image.fromarray(pixels))
        doc["images"].append({"id": i, "file_name": f"{i}.png", "width": width, "height": height})
        doc["annotations"].append({"image_id": i, "category_id": CATEGORIES[0]["id"], "bbox": box})
    root, source = write(tmp_path, doc, "thin")
    for i, picture in enumerate(pictures):
        picture.save(root / f"{i}.png")
    return DetectionDataset(root, source)


@pytest.mark.parametrize(
    "recipe", [v2.Resize(64, max_size=100), v2.Resize(None, max_size=64), RECIPE, fit_canvas(96, 0)]
)
def test_the_thinnest_images_keep_a_pixel_and_their_objects(thin: DetectionDataset, recipe: v2.Transform) -> None:
    dataset = TransformedDataset(thin, recipe, 1, unreadable="stop")
    for i, (epoch, file_size) in enumerate(((1, (20000, 10)), (2, (1, 200)), (3, (64, 64)))):
        sample = dataset[epoch, i]
        assert min(sample.image.shape) >= 1
        assert sample.file_size == file_size
        for box in sample.boxes.round().int().tolist():
            inside = sample.image[:, box[1] : box[3], box[0] : box[2]]
            assert inside.float().mean() > 150
        if not isinstance(recipe, v2.Compose):
            sides = zip(sample.image.shape[1:], file_size, strict=True)
            assert sample.scale == pytest.approx([network / file for network, file in sides])
            assert len(sample.boxes) == 1
            share = sample.boxes.as_subclass(Tensor)[0] / torch.tensor(sample.image.shape[:0:-1] * 2)
            truth = thin[i].boxes.as_subclass(Tensor)[0] / torch.tensor(file_size[::-1] * 2)
            torch.testing.assert_close(share, truth.float(), rtol=0, atol=1e-6)


def test_an_image_on_which_the_transform_fails_stops_or_is_replaced(thin: DetectionDataset) -> None:
    def strict(parts: dict[str, Any]) -> dict[str, Any]:
        assert parts["image"].shape[1:] == (64, 64), "not my size"
        return parts

    with pytest.raises(UnreadableImage, match=r"0\.png \(10x20000 pixels\) cannot be transformed: .*not my size"):
        TransformedDataset(thin, strict, 1, unreadable="stop")[0, 0]
    following = TransformedDataset(thin, strict, 1, unreadable="next")
    assert [following[0, i].image_id for i in range(3)] == [2, 2, 2]
    assert len(following.unreadable_files) == 2
    blank = TransformedDataset(thin, strict, 1, unreadable="blank")[0, 0]
    assert (blank.image_id, blank.file_size, blank.scale) == (0, (20000, 10), (64 / 20000, 64 / 10))
    assert len(blank.boxes) == 0
    assert len(blank.truth["boxes"]) == 1
    assert blank.image.max() == 0


def rectangle(image: Tensor) -> tuple[int, int]:
    """Height and width of what is not grey; it begins in the upper left corner, and all else is grey. The blue channel
    of a painted image is full."""
    grey = image == 114
    rows, columns = (~grey[2]).any(1).sum(), (~grey[2]).any(0).sum()
    assert (image[2, :rows, :columns] > 250).all()
    assert grey[:, rows:].all()
    assert grey[:, :, columns:].all()
    return int(rows), int(columns)


def test_fitted_images_come_back_to_pixels_of_the_file(painted: DetectionDataset) -> None:
    """What a detector finds on the canvas, through the batch and the postprocessing: up to 1.4 pixels per pixel."""
    dataset = TransformedDataset(painted, fit_canvas(96, 114), 0, unreadable="stop")
    samples = [dataset[0, i] for i in range(len(dataset))]
    batch = collate(samples, 32)
    assert batch.images.shape == (12, 3, 96, 96)
    assert not batch.padding.any()
    assert (batch.targets.frames.sizes == 96).all()
    for i, sample in enumerate(samples):
        height, width = rectangle(sample.image)
        assert max(height, width) == 96
        assert sample.boxes[sample.labels == 2][0].tolist() == pytest.approx([0, 0, width, height], abs=1e-5)
        painted_boxes = torch.tensor([extent(sample.image[label]) or [0] * 4 for label in range(2)]).float()
        file = torch.tensor(painted.sizes[i])
        torch.testing.assert_close(torch.tensor(sample.scale), torch.tensor([height, width]) / file)
        scale = (file / torch.tensor([height, width])).flip(0).repeat(2)
        truth = painted.truth(i)["boxes"]
        assert ((painted_boxes * scale - truth[:2]).abs() <= scale).all()
    logits = torch.full((12, 3, 3), -9.0).diagonal_scatter(torch.full((12, 3), 9.0), dim1=1, dim2=2)
    found = PostProcess(3, None)(Prediction(logits, batch.targets.boxes), batch.frames.sizes)
    for i, one in enumerate(batch.frames.to_files(found)):
        truth = painted.truth(i)["boxes"].float()
        torch.testing.assert_close(one.boxes_xyxy[one.labels.argsort()], truth, atol=ROUNDED, rtol=0)


def test_large_scale_jitter_keeps_boxes_on_objects_on_a_grey_canvas(painted: DetectionDataset) -> None:
    dataset = TransformedDataset(painted, large_scale_jitter(80, (0.1, 2.0), 0.5, 114), 1, unreadable="stop")
    factors, removed = [], 0
    for epoch in range(20):
        for index in range(len(dataset)):
            sample = dataset[epoch, index]
            assert sample.image.shape == (3, 80, 80)
            height, width = rectangle(sample.image)
            factors.append(max(painted.sizes[index]) * min(sample.scale) / 80)
            boxes = dict(zip(sample.labels.tolist(), sample.boxes.tolist(), strict=True))
            assert boxes[2] == pytest.approx([0, 0, width, height], abs=1e-5)
            for label in range(2):
                where = extent(sample.image[label, :height, :width])
                if label not in boxes:
                    removed += 1
                    assert where is None or min(where[2] - where[0], where[3] - where[1]) <= 2
                elif where is not None:
                    assert np.abs(np.subtract(where, boxes[label])).max() <= 1.5
    assert removed > 3
    # Uniform: 5 standard errors of the mean of 240; the ends are reached. Small sides are rounded down to pixels.
    assert abs(np.mean(factors) - 1.05) < 5 * 1.9 / 12**0.5 / 240**0.5
    assert 0.08 < min(factors) < 0.2 < 1.9 < max(factors) < 2.03


def test_transforms_that_drop_boxes_can_be_composed(painted: DetectionDataset) -> None:
    """Those of torchvision treat whatever boxes they get as objects."""
    picky = v2.Compose([v2.RandomIoUCrop(), v2.SanitizeBoundingBoxes(min_size=30), v2.Resize((20, 30))])
    dataset = TransformedDataset(painted, picky, 1, unreadable="stop")
    counts = {len(dataset[epoch, index].labels) for epoch in range(5) for index in range(len(dataset))}
    assert {0, 1, 2} <= counts


def test_fits_and_jitter_depend_on_seed_epoch_and_index(painted: DetectionDataset) -> None:
    def dataset() -> TransformedDataset:
        return TransformedDataset(painted, large_scale_jitter(80, (0.1, 2.0), 0.5, 114), 1, unreadable="stop")

    assert same(dataset()[2, 5], dataset()[2, 5])
    assert not same(dataset()[2, 5], dataset()[3, 5])
