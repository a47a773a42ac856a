"""Precision and recall from columns: the engines that compute COCO's and LVIS' numbers, behind one function."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np

from codetr.evaluation.columns import Columns, Ragged, areas, mask_areas, places, rle_of, xywh

IOU_THRESHOLDS = tuple(np.linspace(0.5, 0.95, 10).tolist())
RECALL_THRESHOLDS = tuple(np.linspace(0.0, 1.0, 101).tolist())
AREAS = ("all", "small", "medium", "large")
ABSENT = -1.0  # COCO's value for an average over nothing
CHUNK = 250_000  # detections that an engine sees at once: it needs some 300 bytes for each
CONFUSION_SCORE, CONFUSION_IOU = 0.3, 0.5

Backend = Literal["hotcoco", "faster_coco_eval", "pycocotools"]


@dataclass(frozen=True)
class Rules:
    """limits: numbers of detections per image that count, ascending.
    masks: IoU of instance masks, not of boxes.

    federated: LVIS' rules: the last limit holds for all classes of an image together; only the classes that an image
    was searched for count there; what was found of a class that is not exhaustively annotated there is no mistake.
    iou_thresholds, recall_thresholds: where precision and recall are taken.
    """

    limits: tuple[int, ...]
    masks: bool = False
    federated: bool = False
    iou_thresholds: tuple[float, ...] = IOU_THRESHOLDS
    recall_thresholds: tuple[float, ...] = RECALL_THRESHOLDS


class Curves(NamedTuple):
    """For T IoU thresholds, R recall thresholds, K classes, A = 4 ranges of areas and M limits: precision
    [T, R, K, A, M], recall [T, K, A, M], and scores [T, R, K, A, M] of the detections where a recall is reached; -1
    where a class has no object."""

    precision: np.ndarray
    recall: np.ndarray
    scores: np.ndarray


@dataclass
class Objects:
    """image: [n].
    label: [n].
    boxes: [n, 4] xywh.
    scores: [n], of detections.
    crowd, area: [n], of the truth.
    """

    image: np.ndarray
    label: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray | None = None
    crowd: np.ndarray | None = None
    area: np.ndarray | None = None
    rle: list[Any] | None = None

    def of(self, kept: np.ndarray) -> Objects:
        """kept: rows, or [n] bool."""
        rows = np.flatnonzero(kept) if kept.dtype == bool else kept
        scores, crowd, area = (None if own is None else own[rows] for own in (self.scores, self.crowd, self.area))
        return Objects(self.image[rows], self.label[rows], self.boxes[rows], scores, crowd, area, _some(self.rle, rows))


@dataclass
class Scene:
    """What an engine evaluates. classes: sorted labels. checked: [c, 3] image, label, 1 where not exhaustive."""

    found: Objects
    truth: Objects
    classes: np.ndarray
    checked: np.ndarray

    @property
    def images(self) -> list[int]:
        """The images with anything on them: the others change no number."""
        return np.unique(np.concatenate([self.found.image, self.truth.image])).tolist()


def curves(columns: Columns, num_classes: int, rules: Rules, backend: Backend) -> Curves:
    """The curves of all classes.

    Classes do not know of each other, so the engine gets some of them at a time: what it needs for itself does not
    grow with the data set.
    """
    thresholds, recalls = len(rules.iou_thresholds), len(rules.recall_thresholds)
    shape = (num_classes, len(AREAS), len(rules.limits))
    whole = Curves(*(np.full((thresholds, *middle, *shape), ABSENT) for middle in ((recalls,), (), (recalls,))))
    engine = {"hotcoco": _hotcoco, "faster_coco_eval": _coco_api, "pycocotools": _coco_api}[backend]
    rows = np.bincount(columns.found.rows[:, 5].astype(int), minlength=num_classes)
    for scene in scenes(columns, rules, list(ranges_of(np.cumsum([0, *rows])))):
        if len(scene.truth.image):  # without objects there is nothing to find out
            own = engine(scene, rules, backend)
            whole.precision[:, :, scene.classes] = own.precision
            whole.recall[:, scene.classes] = own.recall
            whole.scores[:, :, scene.classes] = own.scores
    return whole


def overlaps(columns: Columns, num_classes: int, rules: Rules) -> dict[tuple[int, int], np.ndarray]:
    """(index of the image, label) -> IoUs [detections, objects] there, of the detections that count, best first."""
    (scene,) = scenes(columns, rules, [(0, num_classes)])
    found, truth = _by_place(scene.found), _by_place(scene.truth)
    return {
        (image, label): _overlap(scene, found.get((image, label), []), truth.get((image, label), []), rules)
        for image in range(len(columns.ids))
        for label in range(num_classes)
    }


def _by_place(objects: Objects) -> dict[tuple[int, int], list[int]]:
    """The objects of each (image, label)."""
    places: dict[tuple[int, int], list[int]] = {}
    for i, place in enumerate(zip(objects.image.tolist(), objects.label.tolist(), strict=True)):
        places.setdefault(place, []).append(i)
    return places


def _overlap(scene: Scene, found: list[int], truth: list[int], rules: Rules) -> np.ndarray:
    from pycocotools.mask import iou

    assert scene.found.scores is not None
    assert scene.truth.crowd is not None
    best = [found[i] for i in np.argsort(-scene.found.scores[found], kind="stable")[: rules.limits[-1]]]
    shapes = [
        [objects.rle[i] for i in own] if objects.rle is not None else objects.boxes[own]
        for objects, own in ((scene.found, best), (scene.truth, truth))
    ]
    return np.asarray(iou(*shapes, scene.truth.crowd[truth].tolist())).reshape(len(best), len(truth))


def confusion(columns: Columns, num_classes: int, rules: Rules) -> np.ndarray:
    """[K + 1, K + 1] objects of a class (row) that were found as a class (column), at CONFUSION_IOU and more.

    The last row is of detections of nothing, the last column of objects that were missed. Detections below
    CONFUSION_SCORE do not count, so this is done for a fraction of what the curves take.
    """
    rows = columns.found.rows
    sure = rows[:, 4] >= CONFUSION_SCORE
    counts = np.bincount(columns.found.owners[sure], minlength=len(columns.ids))
    if not rules.masks:  # whose run lengths are told apart later
        columns = columns._replace(found=Ragged(rows[sure], counts))
    matrix = np.zeros((num_classes + 1, num_classes + 1), np.int64)
    for some in ranges_of(np.cumsum([0, *counts])):
        here = np.zeros(len(counts), bool)
        here[slice(*some)] = True
        for scene in scenes(columns.of(here), rules, [(0, num_classes)]):
            assert scene.found.scores is not None
            scene = replace(scene, found=scene.found.of(scene.found.scores >= CONFUSION_SCORE))
            evaluation = hotcoco_evaluation(scene, rules)
            matrix += evaluation.confusion_matrix(CONFUSION_IOU, rules.limits[-1])["matrix"].astype(np.int64)
    return matrix


def scenes(columns: Columns, rules: Rules, ranges: Sequence[tuple[int, int]]) -> Iterator[Scene]:
    """Each with the labels of a range; their images are numbered in the order of the ids."""
    number = _numbers(columns)
    owners, true_owners = number[columns.found.owners], number[columns.truth.owners]
    checked = np.column_stack([number[columns.checked.owners], columns.checked.rows])
    rle, true_rle = _rle(columns) if rules.masks else (None, None)
    keep, true_keep = _counts_in_lvis(columns, rules.limits[-1], rle) if rules.federated else (None, None)
    by_class, labels = _by_class(columns.found.rows[:, 5], keep)
    true_by_class, true_labels = _by_class(columns.truth.rows[:, 4], true_keep)
    for first, last in ranges:
        rows = by_class[slice(*np.searchsorted(labels, (first, last)))]
        true_rows = true_by_class[slice(*np.searchsorted(true_labels, (first, last)))]
        yield Scene(
            _found(columns.found.rows[rows], owners[rows], _some(rle, rows)),
            _truth(columns.truth.rows[true_rows], true_owners[true_rows], _some(true_rle, true_rows)),
            np.arange(first, last),
            checked[(checked[:, 1] >= first) & (checked[:, 1] < last)],
        )


def _numbers(columns: Columns) -> np.ndarray:
    """[I]: of the images, in the order of their ids."""
    return np.argsort(np.argsort(columns.ids, kind="stable"), kind="stable").astype(np.int32)


def _rle(columns: Columns) -> tuple[list[Any], list[Any]]:
    """The run lengths of all detections, and of all objects."""
    return (
        rle_of(columns.found_runs, columns.found.counts, columns.sizes),
        rle_of(columns.truth_rle, columns.truth.counts, columns.sizes),
    )


def _some(rle: list[Any] | None, rows: np.ndarray) -> list[Any] | None:
    return None if rle is None else [rle[i] for i in rows.tolist()]


def _found(rows: np.ndarray, owners: np.ndarray, rle: list[Any] | None) -> Objects:
    rows = rows.astype(float)
    return Objects(owners, rows[:, 5].astype(np.int64), xywh(rows), scores=rows[:, 4], rle=rle)


def _truth(rows: np.ndarray, owners: np.ndarray, rle: list[Any] | None) -> Objects:
    rows = rows.astype(float)
    crowd, area = rows[:, 5] > 0, rows[:, 6]
    return Objects(owners, rows[:, 4].astype(np.int64), xywh(rows), crowd=crowd, area=area, rle=rle)


def in_coco_format(columns: Columns, boxes: bool, masks: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A data set, and what was found in it; its images are numbered in the order of the ids."""
    number = _numbers(columns)
    rle, true_rle = _rle(columns) if masks else (None, None)
    found = _entries(_found(columns.found.rows, number[columns.found.owners], rle), boxes)
    truth = _entries(_truth(columns.truth.rows, number[columns.truth.owners], true_rle), boxes)
    labels = np.unique(np.concatenate([columns.found.rows[:, 5], columns.truth.rows[:, 4]])).astype(int).tolist()
    sizes = columns.sizes[np.argsort(number)].tolist()
    dataset = {
        "info": {},
        "images": [{"id": i, "height": h, "width": w} for i, (h, w) in enumerate(sizes)],
        "annotations": truth,
        "categories": [{"id": label, "name": str(label)} for label in labels],
    }
    return dataset, found


def _by_class(labels: np.ndarray, keep: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """The rows to keep in the order of their labels, and the labels."""
    short = labels.astype(np.uint16)  # of 16 bits numpy sorts in linear time
    order = np.argsort(short, kind="stable")
    if keep is not None:
        order = order[keep[order]]
    return order, short[order]


def ranges_of(ends: np.ndarray, chunk: int = CHUNK) -> Iterator[tuple[int, int]]:
    """[first, last) with no more than `chunk` rows each, or one. ends: [n + 1], rows before each of n things."""
    first = 0
    while first < len(ends) - 1:
        last = max(first + 1, int(np.searchsorted(ends, ends[first] + chunk, side="right")) - 1)
        yield first, last
        first = last


def _counts_in_lvis(columns: Columns, limit: int, rle: list[Any] | None) -> tuple[np.ndarray, np.ndarray]:
    """[n], [m] bool: the detections and the objects that count.

    Those are the best `limit` detections of each image whose class is among its objects or its negatives. Like
    lvis-api, without what has no area.
    """
    owners, rows = columns.found.owners, columns.found.rows
    objects, true_owners, true_labels = columns.truth.rows[:, 6] > 0, columns.truth.owners, columns.truth.rows[:, 4]
    negative = columns.checked.rows[:, 1] == 0
    searched = [
        _pairs(true_owners[objects], true_labels[objects]),
        _pairs(columns.checked.owners[negative], columns.checked.rows[negative, 0]),
    ]
    known = np.isin(_pairs(owners, rows[:, 5]), np.concatenate(searched))
    return (places(columns.found) < limit) & known & (areas(rows, rle) > 0), objects


def _pairs(image: np.ndarray, label: np.ndarray) -> np.ndarray:
    """One number for each pair of the two."""
    return (image.astype(np.int64) << 32) + label.astype(np.int64)


def _hotcoco(scene: Scene, rules: Rules, backend: str) -> Curves:
    return _evaluated(hotcoco_evaluation(scene, rules), rules)


def hotcoco_evaluation(scene: Scene, rules: Rules) -> Any:
    """hotcoco takes columns; its digits are those of pycocotools, and of lvis-api."""
    from hotcoco import COCO, COCOeval

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
        segmentation=truth.rle,
    )
    assert found.scores is not None
    table = np.column_stack([found.image, found.boxes, found.scores, found.label])
    detections = true.load_res(table, segmentation=found.rle)
    if rules.federated:
        detections = detections.cap_detections_per_image(None)  # done already, before the classes parted
    if found.rle:
        detections.update_anns(ids=np.arange(1, len(table) + 1), area=mask_areas(found.rle))
    return COCOeval(true, detections, "segm" if rules.masks else "bbox", lvis_style=rules.federated)


def _coco_api(scene: Scene, rules: Rules, backend: str) -> Curves:
    """pycocotools, or faster-coco-eval, which has its interface: a dictionary per object."""
    if backend == "pycocotools":
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    else:
        from faster_coco_eval.core import COCO
        from faster_coco_eval.core import COCOeval_faster as COCOeval
    sizes = {
        image: rle["size"]
        for objects in (scene.found, scene.truth)
        for image, rle in zip(objects.image.tolist(), objects.rle or [], strict=False)
    }
    found, truth = scene.found, scene.truth
    found.area = mask_areas(found.rle) if found.rle else found.boxes[:, 2] * found.boxes[:, 3]
    images = [{"id": i, "height": h, "width": w} for i in scene.images for h, w in [sizes.get(i, (0, 0))]]
    categories = [{"id": k} for k in scene.classes.tolist()]
    both = [COCO(), COCO()]
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        for coco, objects in zip(both, (truth, found), strict=True):
            coco.dataset = {"images": images, "categories": categories, "annotations": _entries(objects)}
            coco.createIndex()
        return _evaluated(COCOeval(*both, "segm" if rules.masks else "bbox"), rules)


def _evaluated(evaluation: Any, rules: Rules) -> Curves:
    parameters = evaluation.params
    parameters.iouThrs, parameters.recThrs = np.array(rules.iou_thresholds), np.array(rules.recall_thresholds)
    parameters.maxDets = list(rules.limits)
    evaluation.evaluate()
    evaluation.accumulate()
    found = evaluation.eval
    return Curves(*(np.asarray(found[name]) for name in Curves._fields))


def _entries(objects: Objects, boxes: bool = True) -> list[dict[str, Any]]:
    """COCO annotations."""
    count = len(objects.image)
    columns = {
        "id": range(1, count + 1),
        "image_id": objects.image.tolist(),
        "category_id": objects.label.tolist(),
        "area": objects.area.tolist() if objects.area is not None else [0.0] * count,
        "iscrowd": objects.crowd.astype(int).tolist() if objects.crowd is not None else [0] * count,
    }
    if boxes:
        columns["bbox"] = objects.boxes.tolist()
    if objects.scores is not None:
        columns["score"] = objects.scores.tolist()
    if objects.rle is not None:
        columns["segmentation"] = [{**rle, "counts": rle["counts"].decode()} for rle in objects.rle]
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
