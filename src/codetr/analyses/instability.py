"""Instability of one-to-one matching (Co-DETR, sec. 3.4 and fig. 5; DN-DETR, arXiv 2203.01305, sec. 3.1).

V_e(q) is the object to which query q is matched at epoch e, -1 for none, in an image without augmentation. IS_e is the
number of queries with V_e(q) != V_{e-1}(q), the mean over a fixed set of images.

An object that changes its query counts twice, for the query that it leaves and for the one that it gets. Queries of
two-stage detectors are ranks of proposals: what changes place in the ranking counts as a change, too.

Left open by the paper: which decoder layer is matched (the last, `layer`); what lies between two points, an epoch or
any number of steps, is what the run has kept (callbacks=[default,snapshots]). While a run trains, the callback of
`conf/callbacks/instability.yaml` logs the same number at every validation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from codetr.analyses.drawing import colour, named, plots
from codetr.analyses.matched import objects_of_queries
from codetr.analyses.subject import Result, Snapshot, Subject, by_label, labels
from codetr.errors import UserError
from codetr.types import MAIN


@dataclass(frozen=True)
class Instability:
    """layer: of the decoder, whose predictions are matched; -1: the last."""

    layer: int

    def __call__(self, subjects: Sequence[Subject]) -> Result:
        rows: list[dict[str, Any]] = []
        means: list[float] = []
        for subject in subjects:
            if len(subject.kept) < 2:
                raise UserError(
                    f"{subject.name}: has {len(subject.kept)} snapshots, and a change needs two: train it with "
                    "callbacks=[default,snapshots], or keep the logged one, callbacks=[default,instability]"
                )
            history = [(snapshot.step, self._matched(snapshot, subject)) for snapshot in subject.history()]
            values = [(step, changed(before, after)) for (_, before), (step, after) in pairwise(history)]
            rows += [
                {"run": subject.name, "label": subject.label, "step": step, "instability": value}
                for step, value in values
            ]
            means.append(sum(value for _, value in values) / len(values))
        return Result(rows, {"mean_instability": by_label(subjects, means)}, {"": _lines(subjects, rows)})

    @torch.no_grad()
    def _matched(self, snapshot: Snapshot, subject: Subject) -> list[Tensor]:
        found: list[Tensor] = []
        for batch in subject.batches():
            output = snapshot.detector(batch.images, batch.padding)
            found += objects_of_queries(output, MAIN, batch.targets, snapshot.cost, self.layer).cpu()
        return found


def changed(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """IS, the mean over images: queries whose object is another one than before. Both: of every image, [N]."""
    return sum(int((old != new).sum()) for old, new in zip(before, after, strict=True)) / len(before)


def _lines(subjects: Sequence[Subject], rows: Sequence[dict[str, Any]]) -> Any:
    figure, axes = plots(1, 1)
    every = labels(subjects)
    for subject in subjects:
        points = [(row["step"], row["instability"]) for row in rows if row["run"] == subject.name]
        first = subject is next(one for one in subjects if one.label == subject.label)
        style = {"color": colour(every.index(subject.label)), "marker": "o", "markersize": 3}
        axes[0, 0].plot(*zip(*points, strict=True), label=subject.label if first else None, **style)
    axes[0, 0].set_ylim(bottom=0)
    named(axes[0, 0], "instability of matching", "step", "changed queries per image")
    return figure
