"""Whether a score of 0.8 is right four times out of five."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from codetr.reporting.matching import Matches

BINS = 20


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
    number = np.bincount(bins, minlength=BINS)
    with np.errstate(invalid="ignore"):
        mean, share = (np.bincount(bins, own, BINS) / number for own in (score, right))
    error = float(np.nansum(np.abs(mean - share) * number) / max(1, len(score)))
    return Calibration(np.linspace(0, 1, BINS + 1), number, mean, share, error)
