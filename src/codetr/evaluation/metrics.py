"""The COCO numbers, AP per class and precision-recall curves: one evaluation, any number of processes."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics.detection import MeanAveragePrecision

from codetr.types import Detections

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALL_THRESHOLDS = np.linspace(0.0, 1.0, 101)
ABSENT = -1.0  # COCO's value for an average over nothing

# A COCO area of 0 counts as small; torchmetrics would put the box's area in its place.
SMALLEST_AREA = 1e-6

Runs = dict[str, Any]  # compressed run lengths {size, counts}


class Record(NamedTuple):
    """One image on the CPU. found: [n, 6] (xyxy, score, label). truth: [m, 7] (xyxy, label, iscrowd, area)."""

    found: np.ndarray
    truth: np.ndarray
    found_runs: list[Runs] | None = None
    truth_runs: list[Runs] | None = None


@dataclass
class Evaluation:
    """What an evaluation found out; -1 stands for an average over nothing, as in COCO.

    numbers: torchmetrics' key -> value (`map`, `map_50`, ..., `mar_large`). map_per_class: class name -> AP, -1 for
    a class without objects. objects_per_class: class name -> number of objects, crowds not counted. precision:
    [10 IoU thresholds, 101 recall thresholds, K]; recall: [10, K]; both for all areas and the most detections.
    """

    numbers: dict[str, float]
    map_per_class: dict[str, float]
    objects_per_class: dict[str, int]
    precision: np.ndarray
    recall: np.ndarray
    images: int


class DetectionMetrics:
    """Collects detections and truth per image on the CPU; `compute` evaluates them as COCO does.

    class_names: name of label 0, 1, .... max_detections: the most detections of an image that count; COCO's own
    numbers take 100. backend: the engine behind torchmetrics. masks: of instance masks, by their scores, not of boxes.
    """

    def __init__(
        self,
        class_names: Sequence[str],
        max_detections: int = 100,
        backend: Literal["faster_coco_eval", "pycocotools"] = "faster_coco_eval",
        masks: bool = False,
    ) -> None:
        self.class_names = list(class_names)
        self.max_detections = max_detections
        self.backend: Literal["faster_coco_eval", "pycocotools"] = backend
        self.masks = masks
        self.evaluation: Evaluation | None = None
        self._records: dict[int, Record] = {}

    def like(self, masks: bool = False) -> DetectionMetrics:
        """Another one with the same settings and no images, of boxes or of masks."""
        return DetectionMetrics(self.class_names, self.max_detections, self.backend, masks)

    def reset(self) -> None:
        """Forget the images; `evaluation` stays until the next `compute`."""
        self._records = {}

    def update(
        self,
        image_ids: Tensor | Sequence[int],
        detections: Sequence[Detections],
        truth: Sequence[dict[str, Any]],
    ) -> None:
        """Add images. truth: per image `boxes` [n, 4] xyxy, `labels`, `iscrowd`, `area` [n], as in `Batch.truth`.

        Boxes are in pixels of the original image; masks, of `runs` in both, are its own size. The whole batch leaves
        the device in one copy.
        """
        scores = [d.mask_scores if self.masks and d.mask_scores is not None else d.scores for d in detections]
        columns = zip(detections, scores, strict=True)
        found = _split([torch.column_stack([d.boxes_xyxy, s, d.labels]) for d, s in columns])
        true = _split([torch.column_stack([t["boxes"], t["labels"], t["iscrowd"], t["area"]]) for t in truth])
        ids = torch.as_tensor(image_ids).tolist()
        runs = [(d.runs, t["runs"]) if self.masks else (None, None) for d, t in zip(detections, truth, strict=True)]
        records = (Record(f, t, *own) for f, t, own in zip(found, true, runs, strict=True))
        self._records.update(zip(ids, records, strict=True))

    def compute(self) -> dict[str, float]:
        """The twelve numbers, the same on every process; `self.evaluation` has the rest.

        An image that several processes saw counts once. Every process must call this equally often.
        """
        self.evaluation = _on_first_process(self._records, self._evaluate)
        return self.evaluation.numbers

    def _evaluate(self, records: dict[int, Record]) -> Evaluation:
        precision, recall = self._curves(records)
        truth = np.concatenate([np.empty((0, 7)), *(record.truth for record in records.values())])
        objects = np.bincount(truth[truth[:, 5] == 0, 4].astype(int), minlength=len(self.class_names))
        ap = [_mean(precision[:, :, k, 0, -1]) for k in range(len(self.class_names))]
        return Evaluation(
            numbers=_summarize(precision, recall, self.max_detections),
            map_per_class=dict(zip(self.class_names, ap, strict=True)),
            objects_per_class=dict(zip(self.class_names, objects.tolist(), strict=True)),
            precision=precision[..., 0, -1],
            recall=recall[..., 0, -1],
            images=len(records),
        )

    def _curves(self, records: dict[int, Record]) -> tuple[np.ndarray, np.ndarray]:
        """Precision [10, 101, K, 4 areas, 3 limits] and recall [10, K, 4, 3] of every class; -1 where undefined."""
        num_classes = len(self.class_names)
        precision = np.full((len(IOU_THRESHOLDS), len(RECALL_THRESHOLDS), num_classes, 4, 3), ABSENT)
        recall = np.full((len(IOU_THRESHOLDS), num_classes, 4, 3), ABSENT)
        if not any(len(record.truth) for record in records.values()):
            return precision, recall
        if self.masks:
            return self._mask_curves(records)
        metric = MeanAveragePrecision(
            iou_thresholds=IOU_THRESHOLDS.tolist(),
            rec_thresholds=RECALL_THRESHOLDS.tolist(),
            max_detection_thresholds=[1, 10, self.max_detections],
            extended_summary=True,
            backend=self.backend,
            sync_on_compute=False,  # _on_first_process has gathered; only that process comes here
        )
        metric.warn_on_many_detections = False
        for _, record in sorted(records.items()):
            metric.update([_box_detections(record.found)], [_box_truth(record.truth)])
        result = metric.compute()
        classes = result["classes"].long().numpy().reshape(-1)
        precision[:, :, classes] = result["precision"].numpy()
        recall[:, classes] = result["recall"].numpy()
        return precision, recall

    def _mask_curves(self, records: dict[int, Record]) -> tuple[np.ndarray, np.ndarray]:
        """By the engine itself: torchmetrics takes masks as pixels, and of images without true masks it forgets the
        detections."""
        coco, evaluator, mask_area = _engine(self.backend)
        images = [{"id": i, **_size(record)} for i, record in records.items()]
        categories = [{"id": k} for k in range(len(self.class_names))]
        truth, found = coco(), coco()
        truth.dataset = {"images": images, "categories": categories, "annotations": _truth(records)}
        found.dataset = {"images": images, "categories": categories, "annotations": _detections(records, mask_area)}
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
            truth.createIndex()
            found.createIndex()
            evaluation = evaluator(truth, found, "segm")
            evaluation.params.iouThrs, evaluation.params.recThrs = IOU_THRESHOLDS, RECALL_THRESHOLDS
            evaluation.params.maxDets = [1, 10, self.max_detections]
            evaluation.evaluate()
            evaluation.accumulate()
        return np.asarray(evaluation.eval["precision"]), np.asarray(evaluation.eval["recall"])


def _engine(backend: str) -> tuple[Any, Any, Callable[..., Any]]:
    """The data set, the evaluation and the area of run lengths of a backend, which is imported only now."""
    if backend == "pycocotools":
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
        from pycocotools.mask import area
    else:
        from faster_coco_eval.core import COCO
        from faster_coco_eval.core import COCOeval_faster as COCOeval
        from faster_coco_eval.core.mask import area
    return COCO, COCOeval, area


def _size(record: Record) -> dict[str, int]:
    """pycocotools wants to know it of every image with masks."""
    runs = (record.truth_runs or []) + (record.found_runs or [])
    height, width = runs[0]["size"] if runs else (0, 0)
    return {"height": height, "width": width}


def _truth(records: dict[int, Record]) -> list[dict[str, Any]]:
    """COCO annotations."""
    entries = []
    for image, record in sorted(records.items()):
        crowd, area = record.truth[:, 5].astype(int).tolist(), record.truth[:, 6].tolist()
        own = _entries(image, record.truth[:, :5], record.truth_runs)
        entries += [entry | {"iscrowd": c, "area": a} for entry, c, a in zip(own, crowd, area, strict=True)]
    return [entry | {"id": i} for i, entry in enumerate(entries, start=1)]


def _detections(records: dict[int, Record], mask_area: Callable[..., Any]) -> list[dict[str, Any]]:
    """COCO results, in the form that an index takes."""
    entries = []
    for image, record in sorted(records.items()):
        area = np.asarray(mask_area(record.found_runs or []))
        own = _entries(image, record.found[:, [0, 1, 2, 3, 5]], record.found_runs)
        columns = zip(own, record.found[:, 4].tolist(), area.tolist(), strict=True)
        entries += [entry | {"score": s, "area": a, "iscrowd": 0} for entry, s, a in columns]
    return [entry | {"id": i} for i, entry in enumerate(entries, start=1)]


def _entries(image: int, rows: np.ndarray, runs: list[Runs] | None) -> list[dict[str, Any]]:
    """rows: [n, 5] xyxy, label."""
    boxes = np.concatenate([rows[:, :2], rows[:, 2:4] - rows[:, :2]], 1).tolist()
    columns = zip(boxes, rows[:, 4].astype(int).tolist(), runs or [], strict=True)
    return [
        {"image_id": image, "bbox": box, "category_id": label, "segmentation": dict(own)} for box, label, own in columns
    ]


def _box_detections(rows: np.ndarray) -> dict[str, Tensor]:
    columns = torch.from_numpy(rows)
    return {"boxes": columns[:, :4], "scores": columns[:, 4], "labels": columns[:, 5].long()}


def _box_truth(rows: np.ndarray) -> dict[str, Tensor]:
    columns = torch.from_numpy(rows)
    return {
        "boxes": columns[:, :4],
        "labels": columns[:, 4].long(),
        "iscrowd": columns[:, 5].long(),
        "area": columns[:, 6].clamp(min=SMALLEST_AREA),
    }


def _split(rows: list[Tensor]) -> list[np.ndarray]:
    """Rows of several images to the CPU in one copy, as float64: the engines compute in it."""
    joined = torch.cat(rows).cpu().double().numpy()
    return np.split(joined, np.cumsum([len(r) for r in rows])[:-1])


def _mean(values: np.ndarray) -> float:
    """The mean of what is defined."""
    defined = values[values > ABSENT]
    return float(defined.mean()) if defined.size else ABSENT


def _summarize(precision: np.ndarray, recall: np.ndarray, max_detections: int) -> dict[str, float]:
    """COCO's averages over IoU thresholds, recall thresholds and classes, in torchmetrics' names."""
    areas = enumerate(("small", "medium", "large"), start=1)
    limits = enumerate((1, 10, max_detections))
    ap, ar = precision[..., -1], recall[..., -1]
    numbers = {"map": ap[..., 0], "map_50": ap[0, ..., 0], "map_75": ap[5, ..., 0]}
    numbers |= {f"mar_{limit}": recall[:, :, 0, i] for i, limit in limits}
    for i, area in areas:
        numbers |= {f"map_{area}": ap[..., i], f"mar_{area}": ar[..., i]}
    return {name: _mean(values) for name, values in numbers.items()}


def _on_first_process(records: dict[int, Record], evaluate: Callable[..., Evaluation]) -> Evaluation:
    """Gather the records on process 0, evaluate there, hand the result to all.

    Always the same two collectives in the same order, whatever a process holds, so none waits for another. They
    run over gloo: the records live on the CPU.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return evaluate(records)
    first = dist.get_rank() == 0
    group: dist.ProcessGroup = dist.new_group(backend="gloo")  # type: ignore[assignment]
    parts: list[dict[int, Record]] | None = [{}] * dist.get_world_size() if first else None
    dist.gather_object(records, parts, dst=0, group=group)
    result: list[Evaluation | None] = [None]
    if parts is not None:
        # In reverse, so that of several copies of an image the one of the lowest rank counts.
        result = [evaluate({i: record for part in reversed(parts) for i, record in part.items()})]
    dist.broadcast_object_list(result, src=0, group=group)
    dist.destroy_process_group(group)
    assert result[0] is not None
    return result[0]
