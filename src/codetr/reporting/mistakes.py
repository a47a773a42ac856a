"""Confusions and labels that are probably wrong, which hotcoco finds, and calibration."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from codetr.evaluation.engines import CONFUSION_IOU, CONFUSION_SCORE, Rules, Scene, hotcoco_evaluation
from codetr.reporting.matching import Matches

BINS = 20
LABEL_SCORE = 0.5  # a detection has to be that sure before it is believed more than a label


class Doubt(NamedTuple):
    """A label that is probably wrong or missing. found: the scene's row of a sure detection. truth: that of the object
    which it contradicts, None where no object is there."""

    found: int
    truth: int | None


class Mistakes(NamedTuple):
    """doubts: the surest first.

    confusion: [K + 1, K + 1] as that of `codetr.evaluation.summary.Evaluation`.
    """

    doubts: list[Doubt]
    confusion: np.ndarray


def mistakes(scene: Scene, matches: Matches, rules: Rules, most: int) -> Mistakes:
    """most: doubts. Crowds, and what was found of them, take no part."""
    classes = len(scene.classes)
    true_rows = matches.counted.nonzero()[0]
    if not len(true_rows):
        return Mistakes([], np.zeros((classes + 1, classes + 1), np.int64))
    kept = np.zeros(len(scene.found.image), bool)
    kept[matches.rows[~matches.ignored[0]]] = True
    assert scene.found.scores is not None
    kept &= scene.found.scores >= min(CONFUSION_SCORE, LABEL_SCORE)  # the rest would not change what follows
    sure, found_rows = _evaluation(scene, kept, matches.counted, rules), kept.nonzero()[0]
    sure.evaluate()
    sure.accumulate()
    errors = sure.image_diagnostics(CONFUSION_IOU, LABEL_SCORE)["label_errors"]
    confusion = sure.confusion_matrix(CONFUSION_IOU, rules.limits[-1], CONFUSION_SCORE)["matrix"]
    return Mistakes(
        [_doubt(error, found_rows, true_rows) for error in errors[:most]],
        np.asarray(confusion).astype(np.int64),
    )


def _evaluation(scene: Scene, found: np.ndarray, truth: np.ndarray, rules: Rules) -> Any:
    """hotcoco's, of some rows, at one IoU threshold; LVIS' rules are applied already."""
    plain = replace(scene, found=scene.found.of(found), truth=scene.truth.of(truth))
    evaluation = hotcoco_evaluation(plain, replace(rules, federated=False))
    evaluation.params.maxDets, evaluation.params.iouThrs = list(rules.limits), [CONFUSION_IOU]
    return evaluation


def _doubt(error: dict[str, Any], found: np.ndarray, truth: np.ndarray) -> Doubt:
    """hotcoco numbers both from 1."""
    one = error["gt_id"]
    return Doubt(int(found[error["dt_id"] - 1]), None if one is None else int(truth[one - 1]))


class Calibration(NamedTuple):
    """Of detections by their scores: edges [B + 1], the number in each [B], their mean score, and the part of them
    that is right, NaN without any; and the expected calibration error, the mean of the difference over detections."""

    edges: np.ndarray
    number: np.ndarray
    score: np.ndarray
    right: np.ndarray
    error: float


def calibration(matches: Matches) -> Calibration:
    """At the first IoU threshold."""
    counts = ~matches.ignored[0]
    score, right = matches.score[counts], matches.right[0][counts]
    bins = np.minimum((score * BINS).astype(int), BINS - 1)
    count = np.bincount(bins, minlength=BINS)
    with np.errstate(invalid="ignore"):
        mean, share = (np.bincount(bins, own, BINS) / count for own in (score, right))
    error = float(np.nansum(np.abs(mean - share) * count) / max(1, len(score)))
    return Calibration(np.linspace(0, 1, BINS + 1), count, mean, share, error)
