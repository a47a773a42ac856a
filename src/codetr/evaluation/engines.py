"""Precision and recall from columns: the engines that compute COCO's and LVIS' numbers, behind one function."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from codetr.errors import UserError
from codetr.evaluation.columns import Columns, Ragged, runs_of

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALL_THRESHOLDS = np.linspace(0.0, 1.0, 101)
AREAS = ("all", "small", "medium", "large")
ABSENT = -1.0  # COCO's value for an average over nothing
CHUNK = 250_000  # detections that an engine sees at once: it needs some 300 bytes for each
CONFUSION_SCORE, CONFUSION_IOU = 0.3, 0.5

Backend = Literal["hotcoco", "faster_coco_eval", "pycocotools"]


@dataclass(frozen=True)
class Rules:
    """limits: numbers of detections per image that count, ascending. masks: IoU of instance masks, not of boxes.

    federated: LVIS' rules: the last limit holds for all classes of an image together; only the classes that an image
    was searched for count there; what was found of a class that is not exhaustively annotated there is no mistake.
    """

    limits: tuple[int, ...]
    masks: bool = False
    federated: bool = False


@dataclass
class Objects:
    """image: [n]. label: [n]. boxes: [n, 4] xywh. scores: [n], of detections. crowd, area: [n], of the truth."""

    image: np.ndarray
    label: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray | None = None
    crowd: np.ndarray | None = None
    area: np.ndarray | None = None
    runs: list[Any] | None = None


@dataclass
class Scene:
    """What an engine evaluates. classes: sorted labels. checked: [c, 3] image, label, 1 where not exhaustive."""

    found: Objects
    truth: Objects
    classes: np.ndarray
    checked: np.ndarray

    @property
    def images(self) -> list[int]:
        """Those with anything on them: the others change no number."""
        return np.unique(np.concatenate([self.found.image, self.truth.image])).tolist()


def curves(columns: Columns, num_classes: int, rules: Rules, backend: Backend) -> tuple[np.ndarray, np.ndarray]:
    """Precision [10, 101, K, 4 areas, limits] and recall [10, K, 4, limits]; -1 where a class has no object.

    Classes do not know of each other, so the engine gets some of them at a time: what it needs for itself does not
    grow with the data set. Raises UserError for a backend that cannot do what `rules` ask for.
    """
    if rules.federated and backend != "hotcoco":
        raise UserError(f"metrics.federated=true (LVIS) needs metrics.backend=hotcoco, not {backend}")
    shape = (num_classes, len(AREAS), len(rules.limits))
    precision = np.full((len(IOU_THRESHOLDS), len(RECALL_THRESHOLDS), *shape), ABSENT)
    recall = np.full((len(IOU_THRESHOLDS), *shape), ABSENT)
    engine = {"hotcoco": _hotcoco, "faster_coco_eval": _coco_api, "pycocotools": _coco_api}[backend]
    rows = np.bincount(columns.found.rows[:, 5].astype(int), minlength=num_classes)
    for scene in _scenes(columns, rules, list(_ranges(np.cumsum([0, *rows])))):
        if len(scene.truth.image):  # without objects there is nothing to find out
            evaluation = engine(scene, rules, backend)
            precision[:, :, scene.classes] = evaluation["precision"]
            recall[:, scene.classes] = evaluation["recall"]
    return precision, recall


def confusion(columns: Columns, num_classes: int, rules: Rules) -> np.ndarray:
    """[K + 1, K + 1] objects of a class (row) whose box was found as a class (column), at CONFUSION_IOU and more.

    The last row is of detections of nothing, the last column of objects that were missed. Detections below
    CONFUSION_SCORE do not count, so this is done for a fraction of what the curves take.
    """
    rows = columns.found.rows
    sure = rows[:, 4] >= CONFUSION_SCORE
    counts = np.bincount(columns.found.owners[sure], minlength=len(columns.ids))
    columns = columns._replace(found=Ragged(rows[sure], counts))
    matrix = np.zeros((num_classes + 1, num_classes + 1), np.int64)
    for some in _ranges(np.cumsum([0, *counts])):
        here = np.zeros(len(counts), bool)
        here[slice(*some)] = True
        of_boxes = replace(rules, masks=False)
        for scene in _scenes(columns.of(here), of_boxes, [(0, num_classes)]):
            evaluation = _hotcoco_evaluation(scene, of_boxes)
            matrix += evaluation.confusion_matrix(CONFUSION_IOU, rules.limits[-1])["matrix"].astype(np.int64)
    return matrix


def _scenes(columns: Columns, rules: Rules, ranges: Sequence[tuple[int, int]]) -> Iterator[Scene]:
    """Each with the labels of a range; their images are numbered in the order of the ids."""
    number = np.argsort(np.argsort(columns.ids, kind="stable"), kind="stable").astype(np.int32)
    owners, true_owners = number[columns.found.owners], number[columns.truth.owners]
    checked = np.column_stack([number[columns.checked.owners], columns.checked.rows])
    found_runs = true_runs = None
    if rules.masks:
        found_runs = runs_of(columns.found_runs, columns.found.counts, columns.sizes)
        true_runs = runs_of(columns.truth_runs, columns.truth.counts, columns.sizes)
    keep, true_keep = _counts_in_lvis(columns, rules.limits[-1], found_runs) if rules.federated else (None, None)
    by_class, labels = _by_class(columns.found.rows[:, 5], keep)
    true_by_class, true_labels = _by_class(columns.truth.rows[:, 4], true_keep)
    for first, last in ranges:
        rows = by_class[slice(*np.searchsorted(labels, (first, last)))]
        true_rows = true_by_class[slice(*np.searchsorted(true_labels, (first, last)))]
        found, truth = columns.found.rows[rows].astype(float), columns.truth.rows[true_rows].astype(float)
        yield Scene(
            Objects(
                owners[rows],
                found[:, 5].astype(np.int64),
                _xywh(found),
                scores=found[:, 4],
                runs=None if found_runs is None else [found_runs[i] for i in rows.tolist()],
            ),
            Objects(
                true_owners[true_rows],
                truth[:, 4].astype(np.int64),
                _xywh(truth),
                crowd=truth[:, 5] > 0,
                area=truth[:, 6],
                runs=None if true_runs is None else [true_runs[i] for i in true_rows.tolist()],
            ),
            np.arange(first, last),
            checked[(checked[:, 1] >= first) & (checked[:, 1] < last)],
        )


def _by_class(labels: np.ndarray, keep: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """The rows to keep in the order of their labels, and the labels."""
    short = labels.astype(np.uint16)  # of 16 bits numpy sorts in linear time
    order = np.argsort(short, kind="stable")
    if keep is not None:
        order = order[keep[order]]
    return order, short[order]


def _ranges(ends: np.ndarray) -> Iterator[tuple[int, int]]:
    """[first, last) with no more than CHUNK rows each, or one. ends: [n + 1], rows before each of n things."""
    first = 0
    while first < len(ends) - 1:
        last = max(first + 1, int(np.searchsorted(ends, ends[first] + CHUNK, side="right")) - 1)
        yield first, last
        first = last


def _xywh(rows: np.ndarray) -> np.ndarray:
    return np.concatenate([rows[:, :2], rows[:, 2:4] - rows[:, :2]], 1)


def _counts_in_lvis(columns: Columns, limit: int, runs: list[Any] | None) -> tuple[np.ndarray, np.ndarray]:
    """[n], [m] bool: the detections and the objects that count.

    Those are the best `limit` detections of each image whose class is among its objects or its negatives. Like
    lvis-api, without what has no area.
    """
    owners, rows = columns.found.owners, columns.found.rows
    order = np.lexsort((-rows[:, 4], owners))  # stable: of equal scores, the first ones
    start = np.cumsum(columns.found.counts) - columns.found.counts
    place = np.empty(len(rows), np.int64)
    place[order] = np.arange(len(rows)) - start[owners[order]]
    objects, true_owners, true_labels = columns.truth.rows[:, 6] > 0, columns.truth.owners, columns.truth.rows[:, 4]
    negative = columns.checked.rows[:, 1] == 0
    searched = [
        _pairs(true_owners[objects], true_labels[objects]),
        _pairs(columns.checked.owners[negative], columns.checked.rows[negative, 0]),
    ]
    known = np.isin(_pairs(owners, rows[:, 5]), np.concatenate(searched))
    return (place < limit) & known & (_areas(rows, runs) > 0), objects


def _areas(rows: np.ndarray, runs: list[Any] | None) -> np.ndarray:
    """[n]: of the masks if there are any, else of the boxes."""
    from hotcoco import mask

    boxes = _xywh(rows)
    return boxes[:, 2] * boxes[:, 3] if runs is None else np.asarray(mask.area(runs), float).reshape(-1)


def _pairs(image: np.ndarray, label: np.ndarray) -> np.ndarray:
    """One number for both."""
    return (image.astype(np.int64) << 32) + label.astype(np.int64)


def _hotcoco(scene: Scene, rules: Rules, backend: str) -> dict[str, Any]:
    return _evaluated(_hotcoco_evaluation(scene, rules), rules)


def _hotcoco_evaluation(scene: Scene, rules: Rules) -> Any:
    """hotcoco takes columns; its digits are those of pycocotools, and of lvis-api."""
    from hotcoco import COCO, COCOeval, mask

    images: list[dict[str, Any]] = [{"id": i} for i in scene.images]
    if rules.federated:
        for name, kind in (("neg_category_ids", 0), ("not_exhaustive_category_ids", 1)):
            own: dict[int, list[int]] = {}
            for image, label in scene.checked[scene.checked[:, 2] == kind, :2].tolist():
                own.setdefault(image, []).append(label)
            images = [{**image, name: own.get(image["id"], [])} for image in images]
    categories = [{"id": k, "name": str(k), "frequency": "f"} for k in scene.classes.tolist()]
    found, truth = scene.found, scene.truth
    true = COCO.from_arrays(
        images,
        categories,
        truth.image,
        truth.label,
        truth.boxes,
        area=truth.area,
        iscrowd=truth.crowd,
        segmentation=truth.runs,
    )
    assert found.scores is not None
    table = np.column_stack([found.image, found.boxes, found.scores, found.label])
    detections = true.load_res(table, segmentation=found.runs)
    if rules.federated:
        detections = detections.cap_detections_per_image(None)  # done already, before the classes parted
    if found.runs:
        detections.update_anns(ids=np.arange(1, len(table) + 1), area=np.asarray(mask.area(found.runs), float))
    return COCOeval(true, detections, "segm" if rules.masks else "bbox", lvis_style=rules.federated)


def _coco_api(scene: Scene, rules: Rules, backend: str) -> dict[str, Any]:
    """pycocotools, or faster-coco-eval, which has its interface: a dictionary per object."""
    if backend == "pycocotools":
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
        from pycocotools.mask import area
    else:
        from faster_coco_eval.core import COCO
        from faster_coco_eval.core import COCOeval_faster as COCOeval
        from faster_coco_eval.core.mask import area
    sizes = {
        image: runs["size"]
        for objects in (scene.found, scene.truth)
        for image, runs in zip(objects.image.tolist(), objects.runs or [], strict=False)
    }
    found, truth = scene.found, scene.truth
    found.area = np.asarray(area(found.runs)) if found.runs else found.boxes[:, 2] * found.boxes[:, 3]
    images = [{"id": i, "height": h, "width": w} for i in scene.images for h, w in [sizes.get(i, (0, 0))]]
    categories = [{"id": k} for k in scene.classes.tolist()]
    both = [COCO(), COCO()]
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        for coco, objects in zip(both, (truth, found), strict=True):
            coco.dataset = {"images": images, "categories": categories, "annotations": _entries(objects)}
            coco.createIndex()
        return _evaluated(COCOeval(*both, "segm" if rules.masks else "bbox"), rules)


def _evaluated(evaluation: Any, rules: Rules) -> dict[str, Any]:
    evaluation.params.iouThrs, evaluation.params.recThrs = IOU_THRESHOLDS, RECALL_THRESHOLDS
    evaluation.params.maxDets = list(rules.limits)
    evaluation.evaluate()
    evaluation.accumulate()
    return {name: np.asarray(evaluation.eval[name]) for name in ("precision", "recall")}


def _entries(objects: Objects) -> list[dict[str, Any]]:
    """COCO annotations."""
    count = len(objects.image)
    columns = {
        "id": range(1, count + 1),
        "image_id": objects.image.tolist(),
        "category_id": objects.label.tolist(),
        "bbox": objects.boxes.tolist(),
        "area": objects.area.tolist() if objects.area is not None else [0.0] * count,
        "iscrowd": objects.crowd.astype(int).tolist() if objects.crowd is not None else [0] * count,
    }
    if objects.scores is not None:
        columns["score"] = objects.scores.tolist()
    if objects.runs is not None:
        columns["segmentation"] = [dict(runs) for runs in objects.runs]
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
