"""Kinds of mistakes: TIDE's errors, confusions, calibration, and labels that are probably wrong. hotcoco finds them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from codetr.evaluation.engines import CONFUSION_IOU, CONFUSION_SCORE, Rules, Scene, hotcoco_evaluation
from codetr.reporting.matching import Matches

# TIDE (ECCV 2020), table 1, in its order: what the AP at IoU 0.5 would gain if no mistake of a kind were made.
KINDS = {
    "Cls": ("class", "found, and called something else"),
    "Loc": ("location", "found, with a box that is off"),
    "Both": ("both", "off, and called something else"),
    "Dupe": ("duplicate", "found once more"),
    "Bkg": ("background", "there is nothing"),
    "Miss": ("missed", "not found, nor nearly"),
    "FP": ("all false alarms", "of whichever of these kinds"),
    "FN": ("all that was not found", "whether missed or nearly found"),
}
BINS = 20
LABEL_SCORE = 0.5  # a detection has to be that sure before it is believed more than a label


class Doubt(NamedTuple):
    """A label that is probably wrong or missing. found: the scene's row of a sure detection. truth: that of the object
    which it contradicts, None where no object is there."""

    found: int
    truth: int | None


class Mistakes(NamedTuple):
    """tide: kind -> AP that is lost, and how often; NaN where no object is there. doubts: the surest first.

    confusion: [K + 1, K + 1] as that of `codetr.evaluation.summary.Evaluation`.
    """

    tide: dict[str, tuple[float, int]]
    doubts: list[Doubt]
    confusion: np.ndarray


def mistakes(scene: Scene, matches: Matches, rules: Rules, most: int) -> Mistakes:
    """most: doubts. Crowds, and what was found of them, take no part."""
    classes = len(scene.classes)
    true_rows = matches.counted.nonzero()[0]
    if not len(true_rows):
        nothing = {kind: (float("nan"), 0) for kind in KINDS}
        return Mistakes(nothing, [], np.zeros((classes + 1, classes + 1), np.int64))
    kept = np.zeros(len(scene.found.image), bool)
    kept[matches.rows[~matches.ignored[0]]] = True
    every = _evaluation(scene, kept, matches.counted, rules)
    every.evaluate()
    every.accumulate()
    tide = every.tide_errors()
    assert scene.found.scores is not None
    kept &= scene.found.scores >= min(CONFUSION_SCORE, LABEL_SCORE)  # the rest would not change what follows
    sure, found_rows = _evaluation(scene, kept, matches.counted, rules), kept.nonzero()[0]
    sure.evaluate()
    sure.accumulate()
    errors = sure.image_diagnostics(CONFUSION_IOU, LABEL_SCORE)["label_errors"]
    confusion = sure.confusion_matrix(CONFUSION_IOU, rules.limits[-1], CONFUSION_SCORE)["matrix"]
    return Mistakes(
        {kind: (float(tide["delta_ap"][kind]), int(tide["counts"].get(kind, 0))) for kind in KINDS},
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
    """Of detections by their scores: bins [B + 1], how many are in each [B], their mean score, and the part of them
    that is right, NaN without any; and the expected calibration error, the mean of the difference over detections."""

    edges: np.ndarray
    count: np.ndarray
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
