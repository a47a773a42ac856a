"""Instance masks: decoded as pycocotools does, moved with their objects, padded in the batch, checked at the start."""

import contextlib
import io
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coco_files import CATEGORIES, document, write
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from torch.nn.functional import max_pool2d
from torchvision.transforms import v2

from codetr.data.collate import collate
from codetr.data.dataset import DetectionDataset
from codetr.data.geometry import RandomSizeCrop
from codetr.data.transforms import TransformedDataset
from codetr.errors import UserError


def polygon(rng: np.random.Generator, box: list[float]) -> list[float]:
    """Five corners in the box [x, y, width, height]."""
    return (np.array(box[:2]) + rng.uniform(0, 1, (5, 2)) * box[2:]).flatten().tolist()


def run_lengths(rng: np.random.Generator, size: tuple[int, int], compressed: bool) -> dict[str, Any]:
    """Of random pixels; column by column, background first."""
    pixels = np.asfortranarray(rng.random(size) < 0.3, np.uint8)
    if compressed:
        runs = coco_mask.encode(pixels)
        return {"size": list(size), "counts": runs["counts"].decode()}
    flat = pixels.flatten("F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *edges, flat.size]).tolist()
    return {"size": list(size), "counts": [0, *counts] if flat[0] else counts}


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Objects with one polygon, with two, and with both kinds of run lengths."""
    rng = np.random.default_rng(0)
    doc = document(12)
    sizes = {image["id"]: (image["height"], image["width"]) for image in doc["images"]}
    for i, annotation in enumerate(doc["annotations"]):
        size, box = sizes[annotation["image_id"]], annotation["bbox"]
        annotation["segmentation"] = [
            [polygon(rng, box)],
            [polygon(rng, box), polygon(rng, box)],
            run_lengths(rng, size, compressed=False),
            run_lengths(rng, size, compressed=True),
        ][i % 4]
    return write(tmp_path, doc)


def test_masks_are_what_pycocotools_reads(files: tuple[Path, Path]) -> None:
    dataset = DetectionDataset(*files, masks=True)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(files[1])
    compared = 0
    for index in range(len(dataset)):
        sample = dataset[index]
        assert sample.masks is not None
        truth = [a for a in coco.imgToAnns[sample.image_id] if not a["iscrowd"]]
        assert sample.masks.shape == (len(truth), *sample.file_size)
        for own, annotation in zip(sample.masks, truth, strict=True):
            assert torch.equal(own, torch.from_numpy(coco.annToMask(annotation)))
            compared += 1
    assert compared > 15


def test_no_masks_unless_asked_for(files: tuple[Path, Path]) -> None:
    sample = DetectionDataset(*files)[3]
    assert sample.masks is None
    assert collate([sample], 32).targets.masks is None


@pytest.fixture
def painted(tmp_path: Path) -> DetectionDataset:
    """Triangles of label 0, 1, 2, filled in the red, green and blue channel of a black image."""
    rng = np.random.default_rng(3)
    doc: dict[str, Any] = {"images": [], "annotations": [], "categories": CATEGORIES}
    canvases = []
    for i in range(8):
        height, width = rng.integers(60, 110, 2).tolist()
        channels = []
        for category in CATEGORIES:
            corners = rng.integers(0, [width, height], (3, 2))
            canvas = Image.new("L", (width, height))
            ImageDraw.Draw(canvas).polygon([tuple(c) for c in corners.tolist()], fill=255)
            channels.append(np.array(canvas))
            low, extent = corners.min(0).tolist(), np.ptp(corners, 0).clip(1).tolist()
            # A pixel's corner in COCO, its centre for the painter.
            segmentation = [(corners + 0.5).flatten().tolist()]
            doc["annotations"].append(
                {"image_id": i, "category_id": category["id"], "bbox": [*low, *extent], "segmentation": segmentation}
            )
        doc["images"].append({"id": i, "file_name": f"{i}.png", "width": width, "height": height})
        canvases.append(np.stack(channels, 2))
    root, source = write(tmp_path, doc, "painted")
    for i, canvas in enumerate(canvases):
        Image.fromarray(canvas).save(root / f"{i}.png")
    return DetectionDataset(root, source, masks=True)


def seam(shape: torch.Tensor) -> torch.Tensor:
    """[1, H, W], 0 or 1 -> bool: three pixels to either side of the outline."""
    return max_pool2d(shape, 7, 1, 3) > -max_pool2d(-shape, 7, 1, 3)


def test_masks_move_with_the_picture(painted: DetectionDataset) -> None:
    """Flip, resize, crop, resize: mask and paint differ along the outline alone (nearest and smooth interpolation)."""
    recipe = v2.Compose(
        [
            v2.RandomHorizontalFlip(0.5),
            v2.RandomApply([v2.RandomShortestSize([64, 80]), RandomSizeCrop(34, 60)], p=0.7),
            v2.RandomShortestSize([28, 34], max_size=60),  # never enlarges
        ]
    )
    dataset = TransformedDataset(painted, recipe, seed=1, unreadable="stop")
    removed = 0
    for epoch in range(10):
        for index in range(len(dataset)):
            sample = dataset[epoch, index]
            assert len(sample.masks) == len(sample.labels) == len(sample.boxes)
            removed += 3 - len(sample.labels)
            for own, label in zip(sample.masks, sample.labels, strict=True):
                paint = (sample.image[label] > 127).float()[None]
                assert ((own == paint) | seam(paint) | seam(own.float()[None])).all()
    assert removed > 0


def test_a_batch_pads_masks_with_nothing(painted: DetectionDataset) -> None:
    samples = [painted[i] for i in range(3)]
    samples[1].boxes, samples[1].labels, samples[1].masks = (
        samples[1].boxes[:1],
        samples[1].labels[:1],
        samples[1].masks[:1],
    )
    batch = collate(samples, 32)
    masks = batch.targets.masks
    assert masks.dtype == torch.bool
    assert masks.shape == (3, 3, *batch.images.shape[-2:])
    for i, sample in enumerate(samples):
        count, height, width = sample.masks.shape
        assert torch.equal(masks[i, :count, :height, :width], sample.masks.bool())
        assert masks[i].sum() == sample.masks.sum()


FAULTS: dict[str, tuple[Any, str]] = {
    "none": (None, "no segmentation"),
    "empty": ([], "no segmentation"),
    "two points": ([[1, 2, 3, 4]], "polygons that are not lists"),
    "odd": ([[1, 2, 3, 4, 5, 6, 7]], "polygons that are not lists"),
    "flat list": ([1, 2, 3, 4, 5, 6], "polygons that are not lists"),
    "words": ([[1, 2, "3", 4, 5, 6]], "polygons that are not lists"),
    "nan": ([[1, 2, 3, 4, 5, float("nan")]], "not finite"),
    "huge": ([[1, 2, 3, 4, 5, 10**400]], "not finite"),
    "text": ("1 2 3", "neither polygons nor run lengths"),
    "no counts": ({"size": [50, 60]}, "neither polygons nor run lengths"),
    "size": ({"size": [60, 50], "counts": "abc"}, r"run lengths of size \[60, 50\] in an image of \[50, 60\]"),
    "sum": ({"size": [50, 60], "counts": [10, 20]}, "do not add up to 50 x 60"),
    "negative": ({"size": [50, 60], "counts": [-10, 3010]}, "do not add up to 50 x 60"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_object_without_a_usable_mask_is_named_or_left_out(
    tmp_path: Path, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    segmentation, message = FAULTS[fault]
    doc = document(4)
    for image in doc["images"]:
        image |= {"width": 60, "height": 50}
    for annotation in doc["annotations"]:
        annotation |= {"bbox": [5, 6, 20, 10], "iscrowd": 0, "segmentation": [[5, 6, 25, 6, 25, 16]]}
    broken = doc["annotations"][2]
    broken["segmentation"] = segmentation
    files = write(tmp_path, doc)
    where = f"annotation {broken['id']} of image {broken['image_id']}: .*{message}"
    with pytest.raises(UserError, match=f"without a usable mask: {where}"):
        DetectionDataset(*files, masks=True)
    with caplog.at_level(logging.WARNING):
        rest = DetectionDataset(*files, masks=True, on_error="skip")
    assert sum(rest.label_counts.values()) == len(doc["annotations"]) - 1
    assert "data.masks=false" in caplog.text
    assert sum(DetectionDataset(*files).label_counts.values()) == len(doc["annotations"])
    broken["iscrowd"] = 1
    assert len(DetectionDataset(*write(tmp_path, doc), masks=True)) == 4
