"""Matching for all layers, groups and images: codetr's against the usual way (DETR and its descendants).

The usual way, per layer and group: costs between the queries and objects of all images, with all classes, one copy to
the host, scipy per image. Both run in one process, alternating; the total cost of the two matchings must agree.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from datetime import date

import torch
from rich.progress import track
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou

from benchmarks import report
from codetr.assign.hungarian import MatchingCost, match
from codetr.types import Frames, Prediction, Problem, Targets

COST = MatchingCost(focal=2.0, l1=5.0, giou=2.0, alpha=0.25, gamma=2.0)
LAYERS, IMAGES, CLASSES = 7, 2, 80
CASES = [(11, 300, 20), (1, 300, 20), (1, 900, 100)]  # groups, queries, objects


def usual(problems: list[Problem], targets: Targets) -> list[list[list[tuple]]]:
    """Per problem, layer and image: (query indices, object indices)."""
    labels = torch.cat([row[ok] for row, ok in zip(targets.labels, targets.valid, strict=True)])
    boxes = torch.cat([row[ok] for row, ok in zip(targets.boxes, targets.valid, strict=True)])
    counts = targets.counts.tolist()
    found = []
    for problem in problems:
        layers = []
        for logits, predicted in zip(problem.prediction.logits, problem.prediction.boxes, strict=True):
            matrix = usual_cost(logits.flatten(0, 1), predicted.flatten(0, 1), labels, boxes)
            matrix = matrix.view(len(logits), -1, len(labels)).cpu()
            own = [part[image] for image, part in enumerate(matrix.split(counts, -1))]
            layers.append([linear_sum_assignment(one) for one in own])
        found.append(layers)
    return found


def usual_cost(logits: Tensor, predicted: Tensor, labels: Tensor, boxes: Tensor) -> Tensor:
    """[B * N, K], [B * N, 4], [objects], [objects, 4] -> [B * N, objects]."""
    probability = logits.sigmoid()
    negative = (1 - COST.alpha) * probability**COST.gamma * -(1 - probability + 1e-8).log()
    positive = COST.alpha * (1 - probability) ** COST.gamma * -(probability + 1e-8).log()
    focal = positive[:, labels] - negative[:, labels]
    l1 = torch.cdist(predicted, boxes, p=1)
    giou = generalized_box_iou(box_convert(predicted, "cxcywh", "xyxy"), box_convert(boxes, "cxcywh", "xyxy"))
    return COST.focal * focal + COST.l1 * l1 - COST.giou * giou


def scene(groups: int, queries: int, objects: int) -> tuple[list[Problem], Targets]:
    torch.manual_seed(0)

    def boxes(*shape: int) -> Tensor:
        return torch.cat([torch.rand(*shape, 2) * 0.6 + 0.2, torch.rand(*shape, 2) * 0.3 + 0.05], -1)

    targets = Targets(
        boxes(IMAGES, objects),
        torch.randint(CLASSES, (IMAGES, objects)),
        torch.ones(IMAGES, objects, dtype=torch.bool),
        Frames.unscaled(torch.full((IMAGES, 2), 800)),
    )
    problems = [
        Problem(Prediction(torch.randn(LAYERS, IMAGES, queries, CLASSES) - 3, boxes(LAYERS, IMAGES, queries)))
        for _ in range(groups)
    ]
    return problems, targets


def total(problems: list[Problem], targets: Targets, found: list[list[list[tuple]]]) -> float:
    value = 0.0
    for problem, layers in zip(problems, found, strict=True):
        costs = COST(problem.prediction, targets.labels, targets.boxes)
        for layer, images in enumerate(layers):
            for image, (query, owner) in enumerate(images):
                value += float(costs[layer, image, owner, query].double().sum())
    return value


def ours(problems: list[Problem], targets: Targets) -> list[list[list[tuple]]]:
    """codetr's matching in the form of `usual`; an object is known by its box."""
    found = []
    for known in match(problems, targets, COST):
        layers = []
        for labels, boxes in zip(known.labels, known.boxes, strict=True):
            images = []
            for image, label in enumerate(labels):
                query = (label >= 0).nonzero()[:, 0]
                same = (boxes[image, query][:, None] == targets.boxes[image][None]).all(-1)
                images.append((query, same.int().argmax(1)))
            layers.append(images)
        found.append(layers)
    return found


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=31)
    repeat, rows = parser.parse_args().repeat, []
    for groups, queries, objects in CASES:
        problems, targets = scene(groups, queries, objects)
        totals = [total(problems, targets, way(problems, targets)) for way in (usual, ours)]
        assert abs(totals[0] - totals[1]) < 1e-5 * abs(totals[0]), totals
        predictions = [problem.prediction for problem in problems]  # the criterion has the groups in one piece
        stacked = Problem(Prediction(*(torch.cat([getattr(p, x) for p in predictions]) for x in ("logits", "boxes"))))
        times: dict[str, list[float]] = {"usual": [], "codetr": []}
        for _ in track(range(repeat), f"{groups} x {queries}, {objects}"):
            times["usual"].append(seconds(lambda: usual(problems, targets)))  # noqa: B023
            times["codetr"].append(seconds(lambda: match([stacked], targets, COST)))  # noqa: B023
        a, b = (1000 * statistics.median(times[name]) for name in times)
        rows.append([f"{groups} x {queries}, {objects}", f"{a:.1f}", f"{b:.1f}", f"{a / b:.1f}"])
    about = (
        f"{LAYERS} layers, {IMAGES} images, {CLASSES} classes; medians of {repeat}; "
        f"`make bench NAME=training/matcher`, {date.today()}, {report.machine()}, {torch.get_num_threads()} threads, "
        f"load average {os.getloadavg()[0]:.1f}."
    )
    head = ["groups x queries, objects", "usual, ms", "codetr, ms", "times faster"]
    report.write("matcher", f"{report.table(head, rows)}\n\n{about}")
