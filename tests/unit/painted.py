"""A data set of which every object has a colour and a label of its own, and what such pictures tell."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from coco_files import write
from PIL import Image
from torch import Tensor

from codetr.data.dataset import DetectionDataset, Sample

IMAGES, OBJECTS = 6, 4
CELLS = [(0, 0), (0, 1), (1, 0), (1, 1)]  # each object has a quarter of the image


def colour(label: int) -> list[int]:
    """Green alone tells it from all others, from black and from the grey of a canvas."""
    return [20 + 7 * label, 250 - 6 * label, 5 * label]


def draw(folder: Path, paint: Any) -> DetectionDataset:
    """Images with a rectangle in every quarter, some up to the border, painted by `paint(pixels, label, box)`."""
    rng = np.random.default_rng(7)
    categories = [{"id": i + 1, "name": str(i)} for i in range(IMAGES * OBJECTS)]
    doc: dict[str, Any] = {"images": [], "annotations": [], "categories": categories}
    canvases = []
    for i in range(IMAGES):
        height, width = (2 * n for n in rng.integers(45, 80, 2).tolist())
        pixels = np.zeros((height, width, 3), np.uint8)
        for j, (row, column) in enumerate(CELLS):
            w, h = int(rng.integers(8, width // 2 + 1)), int(rng.integers(8, height // 2 + 1))
            x = column * width // 2 + int(rng.integers(0, width // 2 - w + 1))
            y = row * height // 2 + int(rng.integers(0, height // 2 - h + 1))
            label = OBJECTS * i + j
            paint(pixels, label, (x, y, x + w, y + h))
            outline = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            record = {"image_id": i, "category_id": label + 1, "bbox": [x, y, w, h], "segmentation": outline}
            doc["annotations"].append({"id": label + 1, **record})
        doc["images"].append({"id": i, "file_name": f"{i}.png", "width": width, "height": height})
        canvases.append(pixels)
    root, source = write(folder, doc, "painted")
    for i, pixels in enumerate(canvases):
        Image.fromarray(pixels).save(root / f"{i}.png")
    return DetectionDataset(root, source, masks=True, cache=None)


def draw_coloured(folder: Path) -> DetectionDataset:
    def paint(pixels: np.ndarray, label: int, box: tuple[int, int, int, int]) -> None:
        pixels[box[1] : box[3], box[0] : box[2]] = colour(label)

    return draw(folder, paint)


def extent(where: Tensor) -> np.ndarray | None:
    """xyxy of the true pixels of [H, W], or None."""
    rows, columns = where.nonzero(as_tuple=True)
    if not len(rows):
        return None
    return np.array([int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1])


def check_consistent(sample: Sample) -> None:
    height, width = sample.image.shape[-2:]
    assert len(sample.boxes) == len(sample.labels) == len(sample.masks)
    assert sample.boxes.canvas_size == (height, width)
    assert sample.masks.shape[1:] == (height, width)
    boxes = sample.boxes.as_subclass(Tensor)
    assert (boxes >= 0).all()
    assert (boxes <= torch.tensor([width, height, width, height])).all()
    assert (boxes[:, 2:] - boxes[:, :2] >= 1).all()
