"""Writes small COCO data sets for the tests of `codetr.data`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CATEGORIES = [{"id": 7, "name": "disc"}, {"id": 3, "name": "square"}, {"id": 12, "name": "star"}]


def write_image(path: Path, width: int, height: int, seed: int = 0, **save: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), np.uint8)
    Image.fromarray(pixels).resize((width, height)).save(path, **save)


def document(count: int = 6, seed: int = 0) -> dict[str, Any]:
    """`count` images of different sizes with 0 to 4 objects each, some of them crowds; ids have gaps."""
    rng = np.random.default_rng(seed)
    images, annotations = [], []
    for i in range(count):
        width, height = int(rng.integers(40, 90)), int(rng.integers(40, 90))
        images.append({"id": 100 + 3 * i, "file_name": f"{i:03}.jpg", "width": width, "height": height})
        for _ in range((i + 1) % 5):
            x, y = rng.uniform(0, 20, 2).round(2).tolist()
            w, h = rng.uniform(5, 18, 2).round(2).tolist()
            annotations.append(
                {
                    "id": 1000 + len(annotations),
                    "image_id": 100 + 3 * i,
                    "category_id": int(rng.choice([7, 3, 12])),
                    "bbox": [x, y, w, h],
                    "area": round(w * h * 0.7, 3),
                    "iscrowd": int(len(annotations) % 5 == 4),
                }
            )
    rng.shuffle(annotations)
    return {"images": images, "annotations": annotations, "categories": CATEGORIES}


def write(folder: Path, doc: dict[str, Any], name: str = "train") -> tuple[Path, Path]:
    """Write `doc` and an image for each of its records; the paths of the image folder and the document."""
    root, source = folder / name, folder / f"{name}.json"
    root.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(doc["images"]):
        write_image(root / image["file_name"], image["width"], image["height"], seed=i)
    source.write_text(json.dumps(doc))
    return root, source
