"""Labels that are probably wrong or missing: what the detector is sure of, and the labels deny."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from codetr.reporting.matching import Matches
from codetr.reporting.tide import Tide

SURE = 0.5  # the score from which on a detection is believed more than a label


class Doubt(NamedTuple):
    """found: the scene's row of a detection. truth: that of the object of another class upon which it lies, None where
    there is no object."""

    found: int
    truth: int | None


def doubts(matches: Matches, tide: Tide, most: int) -> list[Doubt]:
    """TIDE's mistakes of class, and those upon nothing, that have high scores; the surest first."""
    contradicts = tide.of("Cls")
    rows = np.flatnonzero((contradicts | tide.of("Bkg")) & (matches.score >= SURE))
    rows = rows[np.lexsort((matches.rows[rows], -matches.score[rows]))][:most]
    return [Doubt(int(matches.rows[i]), int(tide.object[i]) if contradicts[i] else None) for i in rows.tolist()]
