"""From a preset and a seed to a folder in COCO's format, the same bytes every time."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count
from math import pi
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from codetr.errors import UserError
from codetr.shapes.outlines import SHAPES
from codetr.shapes.regions import box, segmentation
from codetr.shapes.scene import Difficulty, draw

EDITION = 3  # raise it when the same preset and seed give other files
_STAMP = "shapes.json"
_SPLITS = ("train", "val")
_CHUNK = 25


@dataclass(frozen=True)
class Preset:
    """Numbers of images, the longer side of an image in pixels, and how hard they are."""

    train: int
    val: int
    long_side: int
    difficulty: Difficulty


EASY = Difficulty(
    objects=3.5, sizes=(2, 1), typical=0.9, tilt=0.25, camouflage=0.03, clutter=0.7, texture=0.4, tail=0.6
)
HARD = Difficulty(objects=3.2, sizes=(1, 1.25), typical=0, tilt=pi, camouflage=0.125, clutter=2.5, texture=1, tail=1)

PRESETS = {
    "tiny": Preset(train=24, val=12, long_side=96, difficulty=HARD),
    "demo": Preset(train=3000, val=300, long_side=128, difficulty=EASY),
    "full": Preset(train=8000, val=1000, long_side=256, difficulty=HARD),
}


def generate(root: Path, preset: Preset, seed: int, workers: int, progress: bool = False) -> None:
    """Make `root` hold the data set: `train/`, `val/`, `annotations/instances_{train,val}.json`.

    Does nothing when it already does. The result depends on `preset` and `seed` alone, never on `workers`. Processes
    that ask at once wait for the first one. Raises UserError when `root` holds something else.
    """
    stamp = {"generator": "codetr.shapes", "edition": EDITION, "seed": seed, **asdict(preset)}
    stamp = json.loads(json.dumps(stamp))  # as it will be read back
    if _is_complete(root, stamp):
        return
    root = root.absolute()
    root.parent.mkdir(parents=True, exist_ok=True)
    with _lock(root.with_name(f".{root.name}.lock")):
        if _is_complete(root, stamp):
            return
        if root.exists() and not (root / _STAMP).is_file() and any(root.iterdir()):
            raise UserError(f"{root} holds something else than generated shapes: name a new or an empty folder")
        partial_root = root.with_name(f".{root.name}.partial")
        shutil.rmtree(partial_root, ignore_errors=True)
        _write(partial_root, preset, seed, workers, progress)
        (partial_root / _STAMP).write_text(json.dumps(stamp, indent=1))
        if root.exists():
            shutil.rmtree(root)
        partial_root.rename(root)


def _is_complete(root: Path, stamp: dict[str, Any]) -> bool:
    """Whether `root` was generated with `stamp` and no image has gone since."""
    try:
        found = json.loads((root / _STAMP).read_text())
    except (OSError, ValueError):
        return False
    return found == stamp and all(
        (root / "annotations" / f"instances_{split}.json").is_file()
        and sum(1 for _ in (root / split).glob("*.jpg")) == stamp[split]
        for split in _SPLITS
    )


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold `path` for this process alone; the system lets go of it even when the process is killed."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write(root: Path, preset: Preset, seed: int, workers: int, progress: bool) -> None:
    for split in _SPLITS:
        (root / split).mkdir(parents=True)
    (root / "annotations").mkdir()
    jobs = [(split, i) for split in _SPLITS for i in range(getattr(preset, split))]
    paint = partial(_paint, root, preset, seed)
    if workers <= 1:
        documents = _collect(map(paint, jobs), len(jobs), progress)
    else:
        # A fresh interpreter: a fork of a process with threads (torch, a logger) may hang.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, context) as pool:
            documents = _collect(pool.map(paint, jobs, chunksize=_CHUNK), len(jobs), progress)
    for split, document in documents.items():
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(document))


def _collect(painted: Any, total: int, progress: bool) -> dict[str, dict[str, Any]]:
    """One COCO document per split. Annotation ids count through, in the order of the images."""
    documents = {split: _document(split) for split in _SPLITS}
    console = Console(stderr=True, quiet=not progress)
    ids = count(1)
    for split, image, objects in track(painted, "Drawing shapes", total, console=console):
        documents[split]["images"].append(image)
        documents[split]["annotations"] += [{"id": next(ids), "image_id": image["id"], **o} for o in objects]
    return documents


def _document(split: str) -> dict[str, Any]:
    categories = [{"id": s.category_id, "name": s.name, "supercategory": s.supercategory} for s in SHAPES]
    return {
        "info": {"description": f"codetr shapes, {split}", "version": str(EDITION), "year": 2026},
        "licenses": [{"id": 1, "name": "CC0 1.0", "url": "https://creativecommons.org/publicdomain/zero/1.0/"}],
        "images": [],
        "annotations": [],
        "categories": sorted(categories, key=lambda c: c["id"]),
    }


def _paint(
    root: Path, preset: Preset, seed: int, job: tuple[str, int]
) -> tuple[str, dict[str, Any], list[dict[str, Any]]]:
    """Write one image. Returns its split, its record, and its annotations without ids."""
    split, index = job
    rng = np.random.default_rng([seed, _SPLITS.index(split), index])
    short_side = round(preset.long_side * rng.uniform(0.75, 1))
    width, height = (preset.long_side, short_side) if rng.random() < 0.6 else (short_side, preset.long_side)
    picture, scene = draw(rng, height, width, preset.difficulty)
    image_id = 1 + index + (preset.train if split == "val" else 0)
    name = f"{image_id:012}.jpg"
    picture.save(root / split / name, quality=int(rng.integers(85, 91)))
    image = {"id": image_id, "file_name": name, "width": width, "height": height, "license": 1}
    annotations = []
    for i, instance in enumerate(scene.instances):
        mask = scene.mask(i)
        annotations.append(
            {
                "category_id": instance.shape.category_id,
                "iscrowd": int(instance.crowd),
                "bbox": box(mask),
                "area": int(mask.sum()),
                "segmentation": segmentation(mask, instance.crowd),
            }
        )
    return split, image, annotations
