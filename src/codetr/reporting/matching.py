"""Which detection found which object, by COCO's rule, at any IoU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from codetr.evaluation.engines import Objects, Scene, ranges_of

NONE = -1
_PAIRS = 1_000_000  # that are compared at once


class Matches(NamedTuple):
    """n detections in the order of their classes, the best first, and m objects.

    rows: [n] of the scene's detections.
    image, label, score: [n].
    object: [T, n] the object that was found at each of T IoU thresholds, NONE for a false alarm.
    ignored: [T, n] detections that count neither as right nor as wrong: of crowds, of objects out of range, of classes
        that are not annotated exhaustively in an image of LVIS.
    true_image, true_label: [m]. counted: [m] objects that have to be found.
    """

    rows: np.ndarray
    image: np.ndarray
    label: np.ndarray
    score: np.ndarray
    object: np.ndarray
    ignored: np.ndarray
    true_image: np.ndarray
    true_label: np.ndarray
    counted: np.ndarray

    @property
    def right(self) -> np.ndarray:
        """[T, n] bool: detections of an object that counts."""
        return (self.object != NONE) & ~self.ignored

    def ordered(self, order: np.ndarray) -> Matches:
        """With its detections in another order. order: [n]."""
        return self._replace(
            rows=self.rows[order],
            image=self.image[order],
            label=self.label[order],
            score=self.score[order],
            object=self.object[:, order],
            ignored=self.ignored[:, order],
        )


def match(scene: Scene, outside: float, thresholds: Sequence[float] = (0.5,)) -> Matches:
    """outside: from which area on an object is in no range, and need not be found.

    Of an image and class the detection with the highest score chooses first: among the objects that are left, with at
    least that IoU, the one that overlaps most, those that count before all others. A crowd is found by any number.
    """
    found, truth = scene.found, scene.truth
    assert found.scores is not None
    assert truth.crowd is not None
    assert truth.area is not None
    order = np.lexsort((found.image, -found.scores, found.label))
    counted = ~truth.crowd & (truth.area < outside)
    at = np.empty(len(order), np.int64)
    at[order] = np.arange(len(order))
    which, objects, iou = pairs(found, truth, min(thresholds))
    which = at[which]
    first = np.lexsort((-objects, -iou, ~counted[objects], which))
    which, objects, iou = which[first], objects[first], iou[first]
    chosen = np.full((len(thresholds), len(order)), NONE, np.int64)
    for t, threshold in enumerate(thresholds):
        enough = iou >= min(threshold, 1 - 1e-10)
        _choose(which[enough].tolist(), objects[enough].tolist(), truth.crowd.tolist(), chosen[t])
    loose = _not_exhaustive(scene, found)[order]
    ignored = np.where(chosen == NONE, loose, ~counted[chosen] if len(counted) else False)
    return Matches(
        order,
        found.image[order],
        found.label[order],
        found.scores[order],
        chosen,
        ignored,
        truth.image,
        truth.label,
        counted,
    )


def _choose(which: list[int], objects: list[int], crowd: list[bool], chosen: np.ndarray) -> None:
    """Pairs of a detection and an object, in the order in which they are tried; `chosen` gets what comes of it."""
    taken: set[int] = set()
    served = NONE
    for detection, one in zip(which, objects, strict=True):
        if detection == served or one in taken:
            continue
        served = detection
        chosen[detection] = one
        if not crowd[one]:
            taken.add(one)


def _not_exhaustive(scene: Scene, found: Objects) -> np.ndarray:
    """[n] bool: detections of a class of which their image may have further objects."""
    loose = scene.checked[scene.checked[:, 2] == 1]
    return np.isin(_key(found.image, found.label), _key(loose[:, 0], loose[:, 1]))


def _key(image: np.ndarray, label: np.ndarray) -> np.ndarray:
    return (image.astype(np.int64) << 32) + label.astype(np.int64)


def pairs(
    found: Objects, truth: Objects, least: float, by_class: bool = True
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Detections and objects of one image, with IoUs of `least` and more: two rows, and the IoU; of a crowd, the part
    of the detection that lies in it.

    by_class: only those of one class.
    """
    same = (found.label, truth.label) if by_class else (0 * found.label, 0 * truth.label)
    key, true_key = _key(found.image, same[0]), _key(truth.image, same[1])
    order = np.argsort(true_key, kind="stable")
    start = np.searchsorted(true_key[order], key)
    count = np.searchsorted(true_key[order], key, side="right") - start
    parts = list(_compared(found, truth, start, count, order, least))
    if not parts:
        return np.empty(0, int), np.empty(0, int), np.empty(0)
    which, objects, iou = (np.concatenate(own) for own in zip(*parts, strict=True))
    return which, objects, iou


def _compared(
    found: Objects, truth: Objects, start: np.ndarray, count: np.ndarray, order: np.ndarray, least: float
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """start, count: [n] of each detection's objects in `order`."""
    for first, last in ranges_of(np.cumsum([0, *count]), _PAIRS):
        own = count[first:last]
        which = np.repeat(np.arange(first, last), own)
        within = np.arange(len(which)) - np.repeat(np.cumsum(own) - own, own)
        objects = order[np.repeat(start[first:last], own) + within]
        iou = (_mask_iou if found.rle else _box_iou)(found, truth, which, objects)
        enough = iou >= least
        yield which[enough], objects[enough], iou[enough]


def _box_iou(found: Objects, truth: Objects, which: np.ndarray, objects: np.ndarray) -> np.ndarray:
    """[p]."""
    assert truth.crowd is not None
    areas, true_areas = found.boxes[:, 2:].prod(1), truth.boxes[:, 2:].prod(1)
    shared = np.ones(len(which))
    for start, length in ((0, 2), (1, 3)):
        low, true_low = found.boxes[:, start], truth.boxes[:, start]
        high, true_high = low + found.boxes[:, length], true_low + truth.boxes[:, length]
        shared *= (np.minimum(high[which], true_high[objects]) - np.maximum(low[which], true_low[objects])).clip(0)
    union = areas[which]
    union = np.where(truth.crowd[objects], union, union + true_areas[objects] - shared)
    return np.divide(shared, union, out=np.zeros(len(union)), where=union > 0)


def _mask_iou(found: Objects, truth: Objects, which: np.ndarray, objects: np.ndarray) -> np.ndarray:
    """[p], an image at a time."""
    from hotcoco import mask

    assert found.rle is not None
    assert truth.rle is not None
    assert truth.crowd is not None
    iou = np.zeros(len(which))
    order = np.argsort(found.image[which], kind="stable")
    ends = np.flatnonzero(np.diff(found.image[which[order]])) + 1
    for own in np.split(order, ends) if len(order) else ():
        rows, row = np.unique(which[own], return_inverse=True)
        columns, column = np.unique(objects[own], return_inverse=True)
        detections, masks = [found.rle[i] for i in rows.tolist()], [truth.rle[i] for i in columns.tolist()]
        iou[own] = np.asarray(mask.iou(detections, masks, truth.crowd[columns].tolist()))[row, column]
    return iou
