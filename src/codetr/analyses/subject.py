"""What figures are made of, runs and their detectors, and what they become: a table, numbers, pictures."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from codetr.assign.hungarian import MatchingCost
from codetr.models.detector import Detector
from codetr.types import Batch, Detections, Prediction

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor


@dataclass(frozen=True)
class Snapshot:
    """A detector as it was after `step` optimizer steps, in evaluation mode.

    cost: by which it matches queries and objects.
    postprocess: from predictions to detections.
    """

    step: int
    detector: Detector
    class_names: tuple[str, ...]
    cost: MatchingCost
    postprocess: Callable[[Prediction, Tensor], list[Detections]]


@dataclass(frozen=True)
class Subject:
    """A run that is looked at.

    name: no two alike.
    label: the same for runs that differ in nothing but their seed.
    final: opens its checkpoint.
    kept: each opens a snapshot from on the way, in the order of their steps.
    batches: the fixed images, from the first one each time.
    """

    name: str
    label: str
    final: Callable[[], Snapshot]
    kept: Sequence[Callable[[], Snapshot]]
    batches: Callable[[], Iterable[Batch]]

    def history(self) -> Iterator[Snapshot]:
        """What was kept on the way; the final checkpoint where nothing was."""
        for opened in self.kept or (self.final,):
            yield opened()


@dataclass(frozen=True)
class Result:
    """rows: of the table, with equal keys. numbers: what is told of all runs together, plain containers. pictures: by
    what is added to the file's name."""

    rows: list[dict[str, Any]]
    numbers: dict[str, Any]
    pictures: dict[str, Figure]


def by_label(subjects: Sequence[Subject], values: Sequence[float]) -> dict[str, dict[str, float | int | None]]:
    """Mean and spread of a number over the runs of each label. values: of each subject.

    The spread is the standard deviation of a sample, None of one run.
    """
    found: dict[str, dict[str, float | int | None]] = {}
    for label in labels(subjects):
        own = [value for subject, value in zip(subjects, values, strict=True) if subject.label == label]
        spread = statistics.stdev(own) if len(own) > 1 else None
        found[label] = {"mean": statistics.fmean(own), "spread": spread, "runs": len(own)}
    return found


def labels(subjects: Sequence[Subject]) -> list[str]:
    """Each once, in the order of the runs."""
    return list(dict.fromkeys(subject.label for subject in subjects))
