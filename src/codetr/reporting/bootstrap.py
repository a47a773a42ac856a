"""Is one run better than another, or is it the choice of the images? A paired bootstrap (Efron) over images."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from codetr.errors import UserError
from codetr.evaluation.columns import OUTSIDE
from codetr.evaluation.engines import IOU_THRESHOLDS
from codetr.reporting.curves import Ranking, mean_ap
from codetr.reporting.matching import match
from codetr.reporting.stored import Stored

ROUNDS = 1000
_OUTER = (2.5, 97.5)  # percentiles of an interval of 95 %

Progress = Callable[[Iterable[int]], Iterable[int]]


@dataclass(frozen=True)
class Difference:
    """Of the mAP of a second run and a first one, on the same images.

    low, high: an interval of 95 %. better: the part of the draws in which the second is better, a tie counting half.
    """

    first: float
    second: float
    low: float
    high: float
    better: float
    images: int
    rounds: int

    @property
    def value(self) -> float:
        return self.second - self.first

    @property
    def verdict(self) -> str:
        """In words."""
        if self.low > 0:
            return "better, and other images would say the same"
        if self.high < 0:
            return "worse, and other images would say the same"
        return "no difference that other images might not turn round"


def rankings(stored: Stored) -> Ranking:
    """At COCO's ten IoU thresholds."""
    return Ranking(match(stored.scene(), OUTSIDE, IOU_THRESHOLDS), len(stored.about.class_names))


def require_same(first: Stored, second: Stored) -> None:
    """Raises UserError where the two are not of the same images, objects and classes."""
    if first.about.class_names != second.about.class_names:
        raise UserError("they have other classes")
    if not np.array_equal(first.columns.ids, second.columns.ids):
        raise UserError("they were evaluated on other images")
    if not np.array_equal(first.columns.truth.rows, second.columns.truth.rows, equal_nan=True):
        raise UserError("their images have other objects")


def compare(first: Ranking, second: Ranking, images: int, rounds: int, seed: int, progress: Progress) -> Difference:
    """Draw as many images as there are, with replacement, `rounds` times, and evaluate both runs on each draw.

    progress: wraps the rounds.
    """
    rng = np.random.default_rng(seed)
    drawn = np.empty((rounds, 2))
    for i in progress(range(rounds)):
        weights = np.bincount(rng.integers(0, images, images), minlength=images)
        drawn[i] = [mean_ap(one.average_precision(weights)) for one in (first, second)]
    difference = drawn[:, 1] - drawn[:, 0]
    low, high = np.percentile(difference, _OUTER)
    better = np.mean(difference > 0) + np.mean(difference == 0) / 2
    a, b = (mean_ap(one.average_precision()) for one in (first, second))
    return Difference(a, b, float(low), float(high), float(better), images, rounds)
