"""TIDE (ECCV 2020): what AP at IoU 0.5 would gain if no mistake of a kind were made."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from codetr.evaluation.engines import ABSENT, Scene
from codetr.reporting.curves import Ranking
from codetr.reporting.matching import NONE, Matches, pairs

POSITIVE, BACKGROUND = 0.5, 0.1  # IoU
# Table 1 of the paper, in its order.
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


ORDER = ("Loc", "Cls", "Dupe", "Bkg", "Both")  # in which a false alarm is asked what it is
_LOC, _CLS = 0, 1


class Error(NamedTuple):
    """lost: AP; NaN where there are no objects. number: how often the mistake was made."""

    lost: float
    number: int


class Tide(NamedTuple):
    """errors: by the keys of KINDS. kind: [n] of each mistake, as its place in ORDER, NONE of what is no mistake.

    object: [n] the one that a mistake of class or location is about, 0 for others.
    """

    errors: dict[str, Error]
    kind: np.ndarray
    object: np.ndarray

    def of(self, kind: str) -> np.ndarray:
        """[n] bool: the false alarms of one kind."""
        return self.kind == ORDER.index(kind)


class _Best(NamedTuple):
    """Of each detection the object that it overlaps most, NONE below BACKGROUND, and the IoU."""

    object: np.ndarray
    iou: np.ndarray


def tide(scene: Scene, matches: Matches, classes: int) -> Tide:
    """Crowds and what is ignored take no part; only classes with objects count."""
    found = matches.right.any(0)
    hit = np.zeros(len(matches.counted), bool)
    hit[matches.object[0][found]] = True
    open_ = matches.counted & ~hit
    kind, one = _kinds(scene, matches, hit)
    usable = np.zeros(len(hit), bool)
    correctable = ((kind == _CLS) | (kind == _LOC)) & (open_[one] if len(open_) else False)
    usable[one[correctable]] = True
    winner = _winners(matches, one, correctable)
    wrong, missed = kind != NONE, open_ & ~usable
    fixed = {
        "Cls": _corrected(matches, kind == _CLS, winner, one),
        "Loc": _corrected(matches, kind == _LOC, winner, one),
        **{name: _without(matches, kind == ORDER.index(name)) for name in ("Both", "Dupe", "Bkg")},
        "Miss": matches._replace(counted=matches.counted & ~missed),
        "FP": _without(matches, wrong),
        "FN": matches._replace(counted=matches.counted & hit),
    }
    counts = dict(zip(ORDER, np.bincount(kind[wrong], minlength=len(ORDER)).tolist(), strict=True))
    counts |= {"Miss": int(missed.sum()), "FP": int(wrong.sum()), "FN": int(open_.sum())}
    there = Ranking(matches, classes).objects() > 0
    if not there.any():
        return Tide({name: Error(float("nan"), counts[name]) for name in KINDS}, kind, one)
    base = _ap(matches, classes, there)
    gained = {name: max(0.0, _ap(own, classes, there) - base) for name, own in fixed.items()}
    return Tide({name: Error(lost, counts[name]) for name, lost in gained.items()}, kind, one)


def _ap(matches: Matches, classes: int, there: np.ndarray) -> float:
    """The mean over classes that had objects before anything was corrected; one that has none left counts as 0."""
    ap = Ranking(matches, classes).average_precision()[0]
    return float(np.where(ap == ABSENT, 0.0, ap)[there].mean())


def _kinds(scene: Scene, matches: Matches, hit: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each false alarm the first kind that fits, and its object, as in `Tide`.

    hit: [m], objects that were found.
    """
    wrong = np.flatnonzero((matches.object[0] == NONE) & ~matches.ignored[0])
    counted = np.flatnonzero(matches.counted)
    rows = matches.rows[wrong]
    which, objects, iou = pairs(scene.found.of(rows), scene.truth.of(counted), BACKGROUND, by_class=False)
    objects = counted[objects]
    same = scene.found.label[rows][which] == matches.true_label[objects]
    own, other, taken, every = (
        _best(which[part], objects[part], iou[part], len(wrong))
        for part in (same, ~same, same & hit[objects], same | ~same)
    )
    fits = [
        (own.iou >= BACKGROUND) & (own.iou <= POSITIVE),
        other.iou >= POSITIVE,
        taken.iou >= POSITIVE,
        every.iou <= BACKGROUND,
    ]
    kind, one = np.full(len(matches.rows), NONE), np.zeros(len(matches.rows), int)
    kind[wrong] = np.select(fits, range(len(fits)), len(fits))
    one[wrong] = np.select([kind[wrong] == _LOC, kind[wrong] == _CLS], [own.object, other.object], 0)
    return kind, one


def _best(which: np.ndarray, objects: np.ndarray, iou: np.ndarray, detections: int) -> _Best:
    order = np.lexsort((objects, -iou, which))
    first = order[np.unique(which[order], return_index=True)[1]]
    best = _Best(np.full(detections, NONE), np.zeros(detections))
    best.object[which[first]], best.iou[which[first]] = objects[first], iou[first]
    return best


def _winners(matches: Matches, one: np.ndarray, correctable: np.ndarray) -> np.ndarray:
    """[n] bool: of the mistakes about one object the one with the highest score, which alone can be corrected."""
    rows = np.flatnonzero(correctable)
    rows = rows[np.lexsort((matches.rows[rows], -matches.score[rows]))]
    winner = np.zeros(len(correctable), bool)
    winner[rows[np.unique(one[rows], return_index=True)[1]]] = True
    return winner


def _without(matches: Matches, mistakes: np.ndarray) -> Matches:
    return matches._replace(ignored=matches.ignored[:1] | mistakes)


def _corrected(matches: Matches, mistakes: np.ndarray, winner: np.ndarray, one: np.ndarray) -> Matches:
    """Those that win find their object, with its class; the others are gone."""
    right = mistakes & winner
    label = np.where(right, matches.true_label[one] if len(matches.true_label) else 0, matches.label)
    order = np.lexsort((-matches.score, label))
    found = np.where(right, one, matches.object[:1])
    ignored = matches.ignored[:1] | (mistakes & ~winner)
    return matches._replace(label=label, object=found, ignored=ignored).ordered(order)
