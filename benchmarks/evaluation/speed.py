"""What an evaluation costs: codetr's against torchmetrics', time and memory, each in a process of its own.

torchmetrics' default takes minutes.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import report

CLASSES, DETECTIONS, OBJECTS, BATCH = 80, 100, 7, 50
KEYS = (
    *("map", "map_50", "map_75", "map_small", "map_medium", "map_large"),
    *("mar_1", "mar_10", "mar_100", "mar_small", "mar_medium", "mar_large"),
)
SLOWEST = "torchmetrics, pycocotools"
EVALUATORS = (SLOWEST, "torchmetrics, faster_coco_eval", "ours", "ours, drop-in")


def batches(images: int) -> Iterator[tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]]:
    """Detections and truth of 50 images each: some objects are found well, most detections are of nothing.

    Boxes lie on a grid of 1/16 pixel: torchmetrics computes widths in 32 bits, which then are exact.
    """
    generator = torch.Generator().manual_seed(0)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    for _ in range(images // BATCH):
        found, truth = [], []
        for objects in torch.randint(1, 2 * OBJECTS, (BATCH,), generator=generator).tolist():
            corner, size = uniform(objects, 2) * 400, torch.exp(uniform(objects, 2) * 4 + 1.5)
            boxes = on_grid(torch.cat([corner, corner + size], 1))
            labels = torch.randint(CLASSES, (objects,), generator=generator)
            near = boxes + size.repeat(1, 2) * 0.06 * torch.randn(objects, 4, generator=generator)
            corner = uniform(DETECTIONS - objects, 2) * 400
            other = torch.cat([corner, corner + 5 + uniform(DETECTIONS - objects, 2) * 200], 1)
            guess = torch.randint(CLASSES, (DETECTIONS - objects,), generator=generator)
            scores = torch.cat([uniform(objects) * 0.8 + 0.2, uniform(DETECTIONS - objects) * 0.6])
            found.append(
                {"boxes": on_grid(torch.cat([near, other])), "scores": scores, "labels": torch.cat([labels, guess])}
            )
            truth.append(
                {
                    "boxes": boxes,
                    "labels": labels,
                    "iscrowd": torch.zeros_like(labels),
                    "area": (boxes[:, 2:] - boxes[:, :2]).prod(1),
                }
            )
        yield found, truth


def on_grid(boxes: Tensor) -> Tensor:
    return (boxes * 16).round() / 16


class Task:
    """The evaluator as a validation epoch uses it: by image ids."""

    def __init__(self) -> None:
        from codetr.evaluation.mean_ap import detection_metric

        self.metric, self.seen = detection_metric([str(k) for k in range(CLASSES)]), 0
        self.compute = self.metric.compute

    def update(self, found: list[dict[str, Tensor]], truth: list[dict[str, Tensor]]) -> None:
        from codetr.evaluation.inputs import inputs
        from codetr.types import Detections

        ids = range(self.seen, self.seen + len(found))
        self.seen += len(found)
        detections = [Detections(one["scores"], one["labels"], one["boxes"]) for one in found]
        self.metric.update(*inputs(ids, detections, truth))


def contender(name: str) -> Any:
    if name == "ours":
        return Task()
    if name == "ours, drop-in":
        from codetr.evaluation.mean_ap import MeanAveragePrecision as Own

        return Own(class_metrics=True)
    from torchmetrics.detection import MeanAveragePrecision

    # Its own thresholds are those of pycocotools only to 32 bits.
    iou, recall = np.linspace(0.5, 0.95, 10).tolist(), np.linspace(0, 1, 101).tolist()
    backend: Any = name.removeprefix("torchmetrics, ")
    return MeanAveragePrecision(iou_thresholds=iou, rec_thresholds=recall, backend=backend)


def measure(name: str, images: int) -> dict[str, Any]:
    """Seconds of `update` and of `compute`, and of the processors, which other work on the machine does not change; the
    most memory of the process, and over what it had after its imports."""
    metric = contender(name)
    found, truth = next(batches(BATCH))
    metric.update(found, truth)
    metric.compute()
    metric = contender(name)
    before, updating, computing = _resident(), np.zeros(2), np.zeros(2)
    for found, truth in batches(images):
        start = clocks()
        metric.update(found, truth)
        updating += clocks() - start
    start = clocks()
    numbers = metric.compute()
    computing += clocks() - start
    peak = report.peak()
    return {
        "evaluator": name,
        "images": images,
        "update_s": updating[0],
        "compute_s": computing[0],
        "processor_s": updating[1] + computing[1],
        "load": os.getloadavg()[0],
        "peak_mb": peak,
        "added_mb": peak - before,
        "numbers": {key: float(numbers[key]) for key in KEYS},
    }


def clocks() -> np.ndarray:
    """Seconds: on the wall, of all processors for this process."""
    return np.array([time.perf_counter(), time.process_time()])


def _resident() -> float:
    """MB."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def markdown(rows: list[dict[str, Any]]) -> str:
    slowest = next(row for row in rows if row["evaluator"] == SLOWEST)
    about = (
        f"{DETECTIONS} detections and about {OBJECTS} objects per image, {CLASSES} classes, one process, two cores, on "
        f"which {min(row['load'] for row in rows):.0f} to {max(row['load'] for row in rows):.0f} other processes ran. "
        "Times in brackets: of the processors, which those do not change. Memory: what was added to the process' "
        "own after its imports. Difference: the largest of the twelve numbers; torchmetrics' are of 32 bits."
    )
    head = ["evaluator", "images", "update", "compute", "total", "times faster", "memory", "process", "difference"]
    table = []
    for row in rows:
        alike = row["images"] == slowest["images"]
        faster = [_total(slowest) / _total(row), slowest["processor_s"] / row["processor_s"]]
        off = max(abs(row["numbers"][key] - slowest["numbers"][key]) for key in KEYS)
        table.append(
            [
                row["evaluator"],
                str(row["images"]),
                f"{row['update_s']:.2f} s",
                f"{row['compute_s']:.2f} s",
                f"{_total(row):.2f} s ({row['processor_s']:.2f} s)",
                f"{faster[0]:.0f} ({faster[1]:.0f})" if alike else "",
                f"{row['added_mb']:.0f} MB",
                f"{row['peak_mb']:.0f} MB",
                f"{off:.0e}" if alike else "",
            ]
        )
    return f"{about}\n\n{report.table(head, table)}"


def _total(row: dict[str, Any]) -> float:
    return row["update_s"] + row["compute_s"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5_000, help="of every evaluator (default: 5000)")
    parser.add_argument("--more", type=int, default=80_000, help="of ours once more (default: 80000)")
    options = parser.parse_args()
    runs = [*((name, options.images) for name in EVALUATORS), ("ours", options.more)]
    rows = [report.alone(measure, *run) for run in runs]
    report.write("evaluation", markdown(rows), rows)
