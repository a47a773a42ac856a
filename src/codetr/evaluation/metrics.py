"""The COCO or LVIS numbers, AP per class, curves and confusions: one evaluation, any number of processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from codetr.evaluation.columns import OUTSIDE, Columns, columns_of, on_first_process
from codetr.evaluation.engines import ABSENT, AREAS, Backend, Rules, confusion, curves
from codetr.ops.distributed import cpu_group, several
from codetr.types import Detections

FREQUENCIES = {"rare": "r", "common": "c", "frequent": "f"}


@dataclass
class Evaluation:
    """What an evaluation found out; -1 stands for an average over nothing, as in COCO.

    numbers: torchmetrics' key -> value (`map`, `map_50`, ..., `mar_large`). map_per_class: class name -> AP, -1 for
    a class without objects. objects_per_class: class name -> number of objects, without crowds and ignored. precision:
    [10 IoU thresholds, 101 recall thresholds, K]; recall: [10, K]; both for all areas and the most detections.
    confusion: [K + 1, K + 1] objects of a class (row) found as a class (column), at scores of 0.3 and IoUs of 0.5 and
    more; the last row is of detections of nothing, the last column of objects that were missed.
    """

    numbers: dict[str, float]
    map_per_class: dict[str, float]
    objects_per_class: dict[str, int]
    precision: np.ndarray
    recall: np.ndarray
    images: int
    confusion: np.ndarray

    def confused(self, most: int) -> list[tuple[str, str, int]]:
        """The pairs of classes that are confused most: (class of the objects, class they were found as, how often)."""
        counts = self.confusion[:-1, :-1].copy()
        np.fill_diagonal(counts, 0)
        order = np.argsort(-counts, axis=None, kind="stable")[:most]
        pairs = zip(*np.unravel_index(order, counts.shape), strict=True)
        names = list(self.map_per_class)
        return [(names[a], names[b], int(counts[a, b])) for a, b in pairs if counts[a, b]]


class DetectionMetrics:
    """Collects detections and truth on the CPU, as arrays; `compute` evaluates them as COCO does, or LVIS.

    class_names: name of label 0, 1, .... max_detections: the most detections of an image that count; COCO's own
    numbers take 100, LVIS' 300. backend: the engine. masks: of instance masks, by their scores, not of boxes.
    federated: LVIS' rules (see `Rules`) and numbers; its `truth` says what each image was searched for (`neg_labels`,
    `not_exhaustive_labels`: [n] labels). frequency: of each class, r(are), c(ommon) or f(requent); settable, as it is
    known when there is a data set.
    """

    def __init__(
        self,
        class_names: Sequence[str],
        max_detections: int = 100,
        backend: Backend = "hotcoco",
        masks: bool = False,
        federated: bool = False,
        frequency: Sequence[str] | None = None,
    ) -> None:
        self.class_names = list(class_names)
        self.max_detections, self.backend = max_detections, backend
        self.masks, self.federated, self.frequency = masks, federated, frequency
        self.evaluation: Evaluation | None = None
        self._parts: list[Columns] = []

    def like(self, masks: bool = False) -> DetectionMetrics:
        """Another one with the same settings and no images, of boxes or of masks."""
        return DetectionMetrics(
            self.class_names, self.max_detections, self.backend, masks, self.federated, self.frequency
        )

    def reset(self) -> None:
        """Forget the images; `evaluation` stays until the next `compute`."""
        self._parts = []

    def update(
        self,
        image_ids: Tensor | Sequence[int],
        detections: Sequence[Detections],
        truth: Sequence[Mapping[str, Any]],
    ) -> None:
        """Add images. truth: per image `boxes` [n, 4] xyxy, `labels`, `iscrowd`, `area`, perhaps `ignore` [n], as in
        `codetr.types.Truth`.

        Boxes are in pixels of the original image; masks, of `runs` in both, are its own size. Of an image that comes
        again, the last one counts. Raises UserError when `federated` and the truth does not say what was searched for.
        """
        ids = torch.as_tensor(image_ids).tolist()
        if ids:
            self._parts.append(columns_of(ids, detections, truth, self.masks, self.federated))

    def compute(self) -> dict[str, float]:
        """The numbers, the same on every process; `self.evaluation` has the rest.

        An image that several processes saw counts once. Every process must call this equally often. Raises UserError
        for LVIS' rules with another backend than hotcoco.
        """
        columns = Columns.joined(self._parts)
        self._parts = [columns]
        self.evaluation = together(columns, self._evaluate)
        return self.evaluation.numbers

    def _evaluate(self, columns: Columns) -> Evaluation:
        limits = (self.max_detections,) if self.federated else (1, 10, self.max_detections)
        rules, count = Rules(limits, self.masks, self.federated), len(self.class_names)
        precision, recall = curves(columns, count, rules, self.backend)
        truth = columns.truth.rows
        counted = (truth[:, 5] == 0) & (truth[:, 6] < OUTSIDE)
        objects = np.bincount(truth[counted, 4].astype(int), minlength=count)
        numbers = summarize(precision, recall, limits)
        if self.federated:
            numbers |= _by_frequency(precision[:, :, :, 0, -1], self.frequency)
        return Evaluation(
            numbers=numbers,
            map_per_class=dict(zip(self.class_names, per_class(precision[:, :, :, 0, -1]), strict=True)),
            objects_per_class=dict(zip(self.class_names, objects.tolist(), strict=True)),
            precision=precision[..., 0, -1],
            recall=recall[..., 0, -1],
            images=len(columns.ids),
            confusion=confusion(columns, count, rules),
        )


def per_class(values: np.ndarray) -> list[float]:
    """Means of [..., K] over all but the classes."""
    return [mean(values[..., k]) for k in range(values.shape[-1])]


def mean(values: np.ndarray) -> float:
    """The mean of what is defined."""
    defined = values[values > ABSENT]
    return float(defined.mean()) if defined.size else ABSENT


def summarize(precision: np.ndarray, recall: np.ndarray, limits: Sequence[int]) -> dict[str, float]:
    """COCO's averages over IoU thresholds, recall thresholds and classes, in torchmetrics' names."""
    ap, ar = precision[..., -1], recall[..., -1]
    numbers = {"map": ap[..., 0], "map_50": ap[0, ..., 0], "map_75": ap[5, ..., 0]}
    numbers |= {f"mar_{limit}": recall[:, :, 0, i] for i, limit in enumerate(limits)}
    for i, area in enumerate(AREAS[1:], start=1):
        numbers |= {f"map_{area}": ap[..., i], f"mar_{area}": ar[..., i]}
    return {name: mean(values) for name, values in numbers.items()}


def _by_frequency(precision: np.ndarray, frequency: Sequence[str] | None) -> dict[str, float]:
    """LVIS' AP of rare, common and frequent classes. precision: [10, 101, K]."""
    own = np.array(list(frequency) if frequency is not None else [""] * precision.shape[-1])
    return {f"map_{name}": mean(precision[..., own == letter]) for name, letter in FREQUENCIES.items()}


def together(columns: Columns, evaluate: Any) -> Any:
    """evaluate(the columns of all processes) on process 0; its result on every process.

    In the group of CPU tensors, because the columns live there.
    """
    if not several():
        return evaluate(columns)
    group = cpu_group()
    every = on_first_process(columns, group)
    result = [None if every is None else evaluate(every)]
    dist.broadcast_object_list(result, src=0, group=group, device=torch.device("cpu"))
    return result[0]
