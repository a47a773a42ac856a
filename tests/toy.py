"""A COCO data set of coloured rectangles, and the command that trains a detector of toy size on it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
from PIL import Image

import forked
from toy_model import TOY

CLASSES = ("red", "green", "blue")
SIZE = 64


def make_coco(
    folder: Path,
    train: int,
    val: int,
    empty: tuple[int, ...] = (),
    sizes: tuple[tuple[int, int], ...] = ((SIZE, SIZE),),
) -> None:
    """folder/{train,val} with one file of annotations each. empty: training images without an object. sizes: height
    and width of the images, in turn; at least SIZE."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        (folder / split).mkdir(parents=True)
        images, annotations = [], []
        for i in range(count):
            height, width = sizes[i % len(sizes)]
            pixels = np.full((height, width, 3), 90, np.uint8)
            images.append({"id": i + 1, "file_name": f"{i}.png", "width": width, "height": height})
            for _ in range(0 if split == "train" and i in empty else 2):
                label = int(rng.integers(3))
                (x, y), (w, h) = rng.integers(0, 30, 2).tolist(), rng.integers(12, 30, 2).tolist()
                pixels[y : y + h, x : x + w] = np.eye(3, dtype=np.uint8)[label] * 255
                entry = {"id": len(annotations) + 1, "image_id": i + 1, "category_id": label + 1}
                corners = [x, y, x + w, y, x + w, y + h, x, y + h]
                shape = {"bbox": [x, y, w, h], "segmentation": [corners], "area": w * h, "iscrowd": 0}
                annotations.append(entry | shape)
            Image.fromarray(pixels).save(folder / split / f"{i}.png")
        categories = [{"id": k + 1, "name": name} for k, name in enumerate(CLASSES)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / f"{split}.json").write_text(json.dumps(content))


def as_lvis(path: Path) -> None:
    """Red is rare and annotated in every other image only, blue is not exhaustively annotated in some."""
    content = json.loads(path.read_text())
    for category, letter in zip(content["categories"], "rcf", strict=True):
        category["frequency"] = letter
    content["annotations"] = [a for a in content["annotations"] if a["category_id"] != 1 or a["image_id"] % 2]
    for image in content["images"]:
        present = {a["category_id"] for a in content["annotations"] if a["image_id"] == image["id"]}
        searched = {2, 3} | ({1} if image["id"] % 2 else set())
        image["neg_category_ids"] = sorted(searched - present)
        image["not_exhaustive_category_ids"] = [3] if image["id"] % 3 == 0 else []
    path.write_text(json.dumps(content))


def data_overrides(data: Path) -> list[str]:
    """What reads the folder that `make_coco` made."""
    return [
        "data=custom",
        "augment@data=small",
        f"data.root={data}",
        "data.train_images=train",
        "data.train_annotations=train.json",
        "data.val_images=val",
        "data.val_annotations=val.json",
        "data.num_workers=0",
        "data.batch_size=2",
    ]


def overrides(data: Path) -> list[str]:
    """Of `codetr.train`: seconds on one core."""
    return [
        *data_overrides(data),
        *TOY,
        "schedule=constant",
        "schedule.warmup_steps=2",
        "optimizer.lr=1e-3",
        "trainer=cpu",
        "trainer.num_sanity_val_steps=0",
        "trainer.log_every_n_steps=1",
        "trainer.enable_model_summary=false",
        "callbacks.ema.warmup_updates=4",
        "~callbacks.pictures",
        "~callbacks.report",
        "~callbacks.telemetry",  # hours and memory differ from run to run
        "name=toy",
    ]


def command(data: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "codetr.train", *overrides(data), *more]


def environment() -> dict[str, str]:
    here = str(Path(__file__).parent)
    own = {"OMP_NUM_THREADS": "1", "CODETR_MSDA": "reference", "PYTHONDONTWRITEBYTECODE": "", "PYTHONPATH": here}
    return {**os.environ, **own}


def train(data: Path, cwd: Path, *more: str, **variables: str) -> CompletedProcess[str]:
    """In a process of its own; `variables` of its environment."""
    return forked.run("codetr.train", *overrides(data), *more, cwd=cwd, env={**environment(), **variables})
