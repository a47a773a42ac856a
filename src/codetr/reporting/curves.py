"""Precision, recall and AP of every class out of matches, also where images count several times."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from codetr.evaluation.engines import ABSENT, RECALL_THRESHOLDS
from codetr.reporting.matching import Matches

_RECALLS = np.array(RECALL_THRESHOLDS)


class Ranking:
    """The detections of every class, the best first, for AP at T IoU thresholds.

    weights: [I] how often each image counts, in all methods; None: once.
    """

    def __init__(self, matches: Matches, classes: int) -> None:
        self.matches, self.classes = matches, classes
        self._start = np.searchsorted(matches.label, np.arange(classes + 1))
        self._right = [np.flatnonzero(own) for own in matches.right]
        self._ignored = [np.flatnonzero(own) for own in matches.ignored]

    def objects(self, weights: np.ndarray | None = None) -> np.ndarray:
        """[K]: that have to be found."""
        matches = self.matches
        own = None if weights is None else weights[matches.true_image[matches.counted]]
        return np.bincount(matches.true_label[matches.counted], own, self.classes)

    def average_precision(self, weights: np.ndarray | None = None) -> np.ndarray:
        """[T, K], ABSENT for classes without objects: COCO's mean of the interpolated precision at 101 recalls."""
        matches, objects = self.matches, self.objects(weights)
        own = np.ones(len(matches.label)) if weights is None else weights[matches.image].astype(float)
        before = np.concatenate([[0.0], np.cumsum(own)])  # of detections
        found = [self._one(t, own, before, objects) for t in range(len(self._right))]
        return np.array(found)

    def _one(self, t: int, own: np.ndarray, before: np.ndarray, objects: np.ndarray) -> np.ndarray:
        right, ignored = self._right[t], self._ignored[t]
        label = self.matches.label[right]
        start = self._start[label]
        skipped = np.concatenate([[0.0], np.cumsum(own[ignored])])
        place, first = np.searchsorted(ignored, right), np.searchsorted(ignored, start)
        rank = before[right + 1] - before[start] - (skipped[place] - skipped[first])
        hits = np.concatenate([[0.0], np.cumsum(own[right])])
        begin = np.searchsorted(right, self._start)  # of each class among the right ones
        so_far = hits[1:] - hits[begin[label]]
        with np.errstate(invalid="ignore", divide="ignore"):
            precision, recall = np.nan_to_num(so_far / rank), np.nan_to_num(so_far / objects[label])
        best = _falling(precision, label)
        reached = np.searchsorted(_RECALLS, recall, side="right")  # how many of the recalls
        earlier = np.concatenate([[0], reached[:-1]])
        earlier[begin[:-1][begin[:-1] < begin[1:]]] = 0
        total = np.bincount(label, best * (reached - earlier), self.classes) / len(_RECALLS)
        return np.where(objects > 0, total, ABSENT)


def mean_ap(ap: np.ndarray) -> float:
    """Of [T, K] over thresholds and the classes with objects."""
    there = ap[ap > ABSENT]
    return float(there.mean()) if there.size else ABSENT


def _falling(precision: np.ndarray, label: np.ndarray) -> np.ndarray:
    """[p]: of each, the largest of the same label from there on. label: ascending."""
    shifted = precision - 2.0 * label  # no class reaches into one before it
    return np.maximum.accumulate(shifted[::-1])[::-1] + 2.0 * label


@dataclass(frozen=True)
class Operating:
    """What each of K classes does at S scores, and where its F1 is best.

    scores: [S]. hits, false: [S, K] the detections with at least that score, right and wrong ones. precision, recall,
    f1: [S, K] of them, NaN of nothing.
    best, best_precision, best_recall, best_f1: [K] the score with the highest F1, and what it gives; NaN without.
    """

    scores: np.ndarray
    hits: np.ndarray
    false: np.ndarray
    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray
    best: np.ndarray
    best_precision: np.ndarray
    best_recall: np.ndarray
    best_f1: np.ndarray


def operating(matches: Matches, classes: int, points: int = 101) -> Operating:
    """At the first IoU threshold."""
    counts = ~matches.ignored[0]
    label, score, right = matches.label[counts], matches.score[counts], matches.right[0][counts]
    objects = np.bincount(matches.true_label[matches.counted], minlength=classes)
    scores = np.linspace(0, 1, points)
    shape = (points, classes)
    found, hits = np.zeros(shape), np.zeros(shape)
    best = np.full((4, classes), np.nan)
    ends = np.searchsorted(label, np.arange(classes + 1))
    for k in range(classes):
        own = slice(ends[k], ends[k + 1])
        so_far = np.concatenate([[0], np.cumsum(right[own])])
        above = np.searchsorted(-score[own], -scores, side="right")
        found[:, k], hits[:, k] = above, so_far[above]
        if objects[k] and so_far[-1]:
            best[:, k] = _best(score[own], so_far[1:], objects[k])
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = hits / found
        recall = hits / objects
        f1 = 2 * hits / (found + objects)
    return Operating(scores, hits, found - hits, precision, recall, np.where(objects > 0, f1, np.nan), *best)


def _best(score: np.ndarray, so_far: np.ndarray, objects: int) -> tuple[float, float, float, float]:
    """Score, precision, recall and F1 where F1 is highest. score: falling; of equal ones all count, or none."""
    last = np.flatnonzero(np.append(score[1:] < score[:-1], True))
    found = last + 1
    f1 = 2 * so_far[last] / (found + objects)
    i = int(f1.argmax())
    return float(score[last[i]]), so_far[last[i]] / found[i], so_far[last[i]] / objects, float(f1[i])


def precision_at_recalls(matches: Matches, classes: int) -> np.ndarray:
    """[101, K]: interpolated precision at the first IoU threshold, NaN for a class without objects."""
    found = np.full((len(_RECALLS), classes), np.nan)
    objects = np.bincount(matches.true_label[matches.counted], minlength=classes)
    counts = ~matches.ignored[0]
    label, right = matches.label[counts], matches.right[0][counts]
    ends = np.searchsorted(label, np.arange(classes + 1))
    for k in np.flatnonzero(objects).tolist():
        hits = np.cumsum(right[ends[k] : ends[k + 1]])
        precision = hits / np.arange(1, len(hits) + 1)
        best = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
        found[:, k] = best[np.searchsorted(hits / objects[k], _RECALLS)]
    return found
