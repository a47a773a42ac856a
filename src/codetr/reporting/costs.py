"""What each image costs: the average precision that is lost, shared out among what went wrong."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from codetr.reporting.matching import Matches


class Costs(NamedTuple):
    """Parts of the mean over the classes of 1 - AP at the first IoU threshold, where AP is the mean of the precision at
    the rank of every object, without interpolation. found: [n]. truth: [m]. They add up to it.

    An object that was found at precision p lacks 1 - p: one half is its own, the other is shared by the false alarms
    that rank above it. An object that was not found lacks 1, which is its own.
    """

    found: np.ndarray
    truth: np.ndarray

    def of_images(self, matches: Matches, images: int) -> np.ndarray:
        """[I]."""
        own = np.bincount(matches.image, self.found, images)
        return own + np.bincount(matches.true_image, self.truth, images)

    def of_classes(self, matches: Matches, classes: int) -> np.ndarray:
        """[K]."""
        own = np.bincount(matches.label, self.found, classes)
        return own + np.bincount(matches.true_label, self.truth, classes)


def costs(matches: Matches, classes: int) -> Costs:
    objects = np.bincount(matches.true_label[matches.counted], minlength=classes)
    there = max(1, int(np.count_nonzero(objects)))
    share = np.divide(1.0, objects * there, out=np.zeros(classes), where=objects > 0)
    truth = np.where(matches.counted, share[matches.true_label], 0.0)
    found = np.zeros(len(matches.label))
    counts = np.flatnonzero(~matches.ignored[0])
    label, right = matches.label[counts], matches.right[0][counts]
    start = np.searchsorted(label, label)
    rank = np.arange(len(label)) - start + 1
    hits = np.concatenate([[0], np.cumsum(right)])
    precision = (hits[1:] - hits[start]) / rank
    one = matches.object[0][counts]
    truth[one[right]] = share[label[right]] * (1 - precision[right]) / 2
    # Each object below shares 1 / (2 rank) with every false alarm above it.
    below = np.concatenate([[0.0], np.cumsum(np.where(right, 0.5 / rank, 0.0))])
    end = np.searchsorted(label, label, side="right")
    found[counts] = np.where(right, 0.0, share[label] * (below[end] - below[1:]))
    return Costs(found, truth)
