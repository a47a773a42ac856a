"""The directory of a run that never was: random detections and truth, evaluated, with a log and a configuration."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from codetr.callbacks.report import write_metrics
from codetr.evaluation.inputs import inputs
from codetr.evaluation.mean_ap import MeanAveragePrecision, detection_metric
from codetr.names import tags
from codetr.reporting import stored
from codetr.types import Detections

SIDE = 128  # pixels of an image


def scene(
    images: int,
    classes: int,
    seed: int = 0,
    objects: int = 6,
    found: int = 12,
    noise: float = 4.0,
    crowds: bool = False,
    masks: bool = False,
) -> tuple[list[Detections], list[dict[str, Any]]]:
    """Objects, most of them found nearly, some twice or as another class; and detections of nothing. objects, found:
    of an image, at most. Scores are all different."""
    rng = np.random.default_rng(seed)
    every, truth = [], []
    for _ in range(images):
        n = int(rng.integers(0, objects + 1))
        boxes = _boxes(rng, n)
        labels = rng.integers(0, classes, n)
        again = rng.integers(0, max(n, 1), int(rng.integers(0, found + 1))) if n else np.empty(0, int)
        near = boxes[again] + rng.normal(0, noise, (len(again), 4))
        other = np.where(rng.random(len(again)) < 0.8, labels[again], rng.integers(0, classes, len(again)))
        nothing = _boxes(rng, int(rng.integers(0, found // 2 + 1)))
        guess = rng.integers(0, classes, len(nothing))
        corners = np.concatenate([near, nothing]).clip(0, SIDE)
        corners[:, 2:] = np.maximum(corners[:, 2:], corners[:, :2] + 1)
        scores = rng.permutation(np.linspace(0.01, 0.99, len(corners))) if len(corners) else np.empty(0)
        scores = (scores * 0.9 + 0.1 * rng.random(len(corners))).clip(0, 1)
        own = Detections(
            torch.tensor(scores, dtype=torch.float32),
            torch.tensor(np.concatenate([other, guess]), dtype=torch.int64),
            torch.tensor(corners, dtype=torch.float32),
        )
        one: dict[str, Any] = {
            "boxes": torch.tensor(boxes),
            "labels": torch.tensor(labels),
            "iscrowd": torch.tensor(rng.random(n) < (0.2 if crowds else 0)),
            "area": torch.tensor((boxes[:, 2:] - boxes[:, :2]).prod(1)),
        }
        if masks:
            own.rle, one["rle"] = _ellipses(corners), _ellipses(boxes)
            own.mask_scores = own.scores
        every.append(own)
        truth.append(one)
    return every, truth


def _boxes(rng: np.random.Generator, n: int) -> np.ndarray:
    corner, size = rng.uniform(0, SIDE * 0.7, (n, 2)), np.exp(rng.uniform(1.5, 4, (n, 2)))
    return np.concatenate([corner, (corner + size).clip(max=SIDE)], 1)


def _ellipses(boxes: np.ndarray) -> list[dict[str, Any]]:
    from pycocotools import mask as coco_mask

    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    found = []
    for x0, y0, x1, y1 in boxes.tolist():
        inside = ((x - (x0 + x1) / 2) / (x1 - x0)) ** 2 + ((y - (y0 + y1) / 2) / (y1 - y0)) ** 2 <= 0.25
        found.append(coco_mask.encode(np.asfortranarray(inside.astype(np.uint8))))
    return found


def evaluated(
    names: Sequence[str], found: Sequence[Detections], truth: Sequence[dict[str, Any]], masks: bool = False
) -> MeanAveragePrecision:
    """A metric that has computed, and kept its columns. Ids of the images begin at 1."""
    metric = detection_metric(list(names), iou_type="segm" if masks else "bbox")
    metric.keeps_columns = True
    metric.update(*inputs(range(1, len(found) + 1), found, truth, masks=masks))  # type: ignore[arg-type]
    metric.compute()
    return metric


def store(
    metric: MeanAveragePrecision, folder: Path, files: Sequence[str] = (), images: int = 5000, **about: Any
) -> stored.Stored:
    assert metric.columns is not None
    assert metric.class_names is not None
    masks = "segm" in metric.iou_types
    known = stored.About(list(metric.class_names), metric.rules.limits[-1], masks, False, 0, **about)
    count = len(metric.columns.ids)
    sizes = np.full((count, 2), SIDE) if files else np.empty((0, 2))
    own = stored.of_columns(metric.columns, images, known, range(1, count + 1) if files else [], sizes, files)
    own.save(folder)
    return own


def make(
    folder: Path,
    names: Sequence[str] = ("red", "green", "blue"),
    images: int = 12,
    pictures: bool = True,
    masks: bool = False,
    steps: int = 200,
    config: dict[str, Any] | None = None,
    bad: bool = False,
    **how: Any,
) -> Path:
    """how: see `scene`. bad: losses end as NaN."""
    folder.mkdir(parents=True, exist_ok=True)
    found, truth = scene(images, len(names), masks=masks, **how)
    files = []
    if pictures:
        (folder / "photos").mkdir(exist_ok=True)
        for i, one in enumerate(truth):
            pixels = np.full((SIDE, SIDE, 3), 200, np.uint8)
            for x0, y0, x1, y1 in one["boxes"].round().int().tolist():
                pixels[y0:y1, x0:x1] = (90, 120, 60)
            files.append(str(folder / "photos" / f"{i}.jpg"))
            Image.fromarray(pixels).save(files[-1])
    metric = evaluated(names, found, truth)
    about = {"step": steps, "epoch": 3, "machine": {"seed": "0", "command": "codetr train"}}
    store(metric, folder, files, train_objects=list(range(len(names))), **about)
    more: dict[str, Any] = {"epoch": 3, "step": steps}
    if masks:
        other = evaluated(names, found, truth, masks=True)
        store(other, folder, files, **about)
        own = other.evaluations["segm"]
        more["segm"] = own.numbers | {"map_per_class": own.map_per_class}
    evaluation = metric.evaluations["bbox"]
    write_metrics(folder / "metrics.json", evaluation, more)
    log(folder, evaluation.numbers, evaluation.map_per_class, steps, bad)
    (folder / ".hydra").mkdir(exist_ok=True)
    (folder / ".hydra/overrides.yaml").write_text(yaml.safe_dump(["experiment=demo", "optimizer.lr=0.001"]))
    (folder / ".hydra/config.yaml").write_text(yaml.safe_dump(config or {"seed": 0, "optimizer": {"lr": 0.001}}))
    return folder


def log(folder: Path, numbers: dict[str, float], classes: dict[str, float], steps: int, bad: bool) -> None:
    """csv/metrics.csv: losses every step, a validation at every quarter; the last one has the numbers."""
    rng, called = np.random.default_rng(0), tags(classes)
    rows: list[dict[str, Any]] = []
    for step in range(steps):
        terms = {
            f"train/{group}/{layer}/{term}": float("nan") if bad and step > steps // 2 else scale / (1 + step / 20)
            for group, scale in (("main", 2.0), ("denoising", 1.0))
            for layer in (0, 1, "encoder")
            for term in ("class", "l1")
        }
        spent = {"run/hours": step / 360, "run/images": 8.0 * step, "run/images_per_second": 10 + rng.random()}
        rows.append({"step": step, "epoch": step // 50, **terms, "train/loss": sum(terms.values()), "train/lr": 1e-3})
        rows.append({"step": step, **spent, "run/memory_gb": 2.0, "train/gradient_norm": 1 + rng.random()})
        if (step + 1) % max(1, steps // 4) == 0:
            share = (step + 1) / steps
            values = {f"val/{name}": value * share for name, value in numbers.items()}
            values |= {f"val/ap/{called[name]}": value * share for name, value in classes.items()}
            rows.append({"step": step, "epoch": step // 50, **values})
    (folder / "csv").mkdir(exist_ok=True)
    with (folder / "csv/metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
