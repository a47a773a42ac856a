"""What curves say: COCO's and LVIS' numbers, AP per class, confusions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from codetr.evaluation.columns import OUTSIDE, Columns
from codetr.evaluation.engines import ABSENT, AREAS, Backend, Rules, confusion, curves, overlaps

FREQUENCIES = {"rare": "r", "common": "c", "frequent": "f"}


@dataclass
class Evaluation:
    """What an evaluation found out; -1 stands for an average over nothing, as in COCO.

    numbers: torchmetrics' key -> value (`map`, `map_50`, ..., `mar_large`).
    map_per_class, mar_per_class: class name -> AP and AR, -1 for a class without objects.
    objects_per_class: class name -> number of objects, without crowds and ignored.
    precision: [T IoU thresholds, R recall thresholds, K].
    recall: [T, K]; both for all areas and the most detections.
    confusion: [K + 1, K + 1] objects of a class (row) found as a class (column), at scores of 0.3 and IoUs of 0.5 and
        more; the last row is of detections of nothing, the last column of objects that were missed; of boxes alone, and
        where classes have names.
    extended: torchmetrics' extended summary, where it was asked for.
    """

    numbers: dict[str, float]
    map_per_class: dict[str, float]
    mar_per_class: dict[str, float]
    objects_per_class: dict[str, int]
    precision: np.ndarray
    recall: np.ndarray
    images: int
    confusion: np.ndarray | None = None
    extended: dict[str, Any] = field(default_factory=dict)

    def confused(self, most: int) -> list[tuple[str, str, int]]:
        """The pairs of classes that are confused most: (class of the objects, class they were found as, how often)."""
        if self.confusion is None:
            return []
        counts = self.confusion[:-1, :-1].copy()
        np.fill_diagonal(counts, 0)
        order = np.argsort(-counts, axis=None, kind="stable")[:most]
        pairs = zip(*np.unravel_index(order, counts.shape), strict=True)
        names = list(self.map_per_class)
        return [(names[a], names[b], int(counts[a, b])) for a, b in pairs if counts[a, b]]


@dataclass(frozen=True)
class Wishes:
    """What an evaluation is to find out.

    micro: the numbers are of all classes as one.
    extended: torchmetrics' extended summary.
    confusion: which classes are confused.
    frequency: of each class, r(are), c(ommon) or f(requent).
    """

    micro: bool = False
    extended: bool = False
    confusion: bool = False
    frequency: Sequence[str] | None = None


def evaluate(columns: Columns, names: Sequence[str], rules: Rules, backend: Backend, wishes: Wishes) -> Evaluation:
    """names: of the classes that the labels 0, 1, ... of `columns` stand for."""
    columns, count = columns.with_areas(rules.masks), len(names)
    by_class = whole = curves(columns, count, rules, backend)
    merged, classes = columns, count
    if wishes.micro:
        merged, classes = columns.labelled(np.zeros(1), np.zeros(1)), 1
        whole = curves(merged, classes, rules, backend)
    numbers = summarize(whole.precision, whole.recall, rules)
    precision, recall = by_class.precision[..., 0, -1], by_class.recall[..., 0, -1]
    if rules.federated:
        numbers |= _by_frequency(precision, wishes.frequency)
    truth = columns.truth.rows
    counted = (truth[:, 5] == 0) & (truth[:, 6] < OUTSIDE)
    objects = np.bincount(truth[counted, 4].astype(int), minlength=count)
    extended = whole._asdict() | {"ious": overlaps(merged, classes, rules)} if wishes.extended else {}
    return Evaluation(
        numbers=numbers,
        map_per_class=dict(zip(names, per_class(precision), strict=True)),
        mar_per_class=dict(zip(names, per_class(recall), strict=True)),
        objects_per_class=dict(zip(names, objects.tolist(), strict=True)),
        precision=precision,
        recall=recall,
        images=len(columns.ids),
        confusion=confusion(columns, count, rules) if wishes.confusion and not rules.masks else None,
        extended=extended,
    )


def per_class(values: np.ndarray) -> list[float]:
    """Means of [..., K] over all axes but that of the classes."""
    return [mean(values[..., k]) for k in range(values.shape[-1])]


def mean(values: np.ndarray) -> float:
    """The mean of what is defined."""
    defined = values[values > ABSENT]
    return float(defined.mean()) if defined.size else ABSENT


def summarize(precision: np.ndarray, recall: np.ndarray, rules: Rules) -> dict[str, float]:
    """COCO's averages over IoU thresholds, recall thresholds and classes, in torchmetrics' names."""
    ap, ar = precision[..., -1], recall[..., -1]
    numbers = {"map": ap[..., 0]}
    numbers |= {f"map_{percent}": ap[np.isclose(rules.iou_thresholds, percent / 100), ..., 0] for percent in (50, 75)}
    numbers |= {f"mar_{limit}": recall[:, :, 0, i] for i, limit in enumerate(rules.limits)}
    for i, area in enumerate(AREAS[1:], start=1):
        numbers |= {f"map_{area}": ap[..., i], f"mar_{area}": ar[..., i]}
    return {name: mean(values) for name, values in numbers.items()}


def _by_frequency(precision: np.ndarray, frequency: Sequence[str] | None) -> dict[str, float]:
    """LVIS' AP of rare, common and frequent classes. precision: [T, R, K]."""
    own = np.array(list(frequency) if frequency is not None else [""] * precision.shape[-1])
    return {f"map_{name}": mean(precision[..., own == letter]) for name, letter in FREQUENCIES.items()}
