"""Groups of queries (Group DETR, arXiv 2207.13085v1, sec. 3.3, eq. 6 and 7, fig. 3 and 4).

Figure 3 shows where the queries of all groups start. The perturbation distance PD is the mean distance of a query from
the closest one of another group (eq. 6), the matching distance MD that of two queries which are matched with the same
object in two groups (eq. 7); figure 4 has both against training steps.

Left open by the paper, and chosen here: of more than two groups, the mean over all pairs; positions are shares of the
image's sides; matched are the predictions of the last decoder layer; where positions depend on the image (two-stage
detectors), PD is the mean over images. MD is the mean over all objects. A run without snapshots
(callbacks=[default,snapshots]) is a single point of figure 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from codetr.analyses.drawing import colour, named, plots
from codetr.analyses.matched import objects_of_queries, places
from codetr.analyses.subject import Result, Snapshot, Subject, by_label, labels
from codetr.errors import UserError

EXACT = "donot_use_mm_for_euclid_dist"  # of `torch.cdist`: nothing is as far from itself as rounding makes it


@dataclass(frozen=True)
class Groups:
    def __call__(self, subjects: Sequence[Subject]) -> Result:
        rows: list[dict[str, Any]] = []
        points: dict[str, Tensor] = {}
        for subject in subjects:
            for snapshot in subject.history():
                where, pd, md = self._measured(snapshot, subject)
                points[subject.label] = where
                row = {"run": subject.name, "label": subject.label, "groups": len(where), "step": snapshot.step}
                rows.append({**row, "pd": pd, "md": md})
        last = {row["run"]: row for row in rows}
        numbers = {key: by_label(subjects, [last[one.name][key] for one in subjects]) for key in ("pd", "md")}
        return Result(rows, numbers, {"": _lines(subjects, rows), "_points": _points(points)})

    @torch.no_grad()
    def _measured(self, snapshot: Snapshot, subject: Subject) -> tuple[Tensor, float, float]:
        """Places [G, N, 2] in the first image, PD and MD."""
        detector = snapshot.detector
        names = detector.main_groups
        if len(names) < 2:
            raise UserError(f"{subject.name}: has one group of main queries; train with model.query_groups=3, say")
        perturbations, matches, first = [], [], None
        for batch in subject.batches():
            output = detector(batch.images, batch.padding, batch.targets)
            where = torch.stack([places(detector, output, name) for name in names], 1).cpu()  # [B, G, N, 2]
            each = [objects_of_queries(output, name, batch.targets, snapshot.cost) for name in names]
            matched = torch.stack(each, 1).cpu()
            first = where[0] if first is None else first
            perturbations += [perturbation_distance(one) for one in where]
            matches += [matching_distances(*one) for one in zip(where, matched, batch.targets.counts, strict=True)]
        assert first is not None, "there are images"
        return first, float(torch.stack(perturbations).mean()), float(torch.cat(matches).nanmean())


def perturbation_distance(points: Tensor) -> Tensor:
    """Eq. 6; of more than two groups the mean over all pairs. points: [G, N, 2]."""
    nearest = torch.cdist(points[:, None], points[None], compute_mode=EXACT).amin(-1).mean(-1)  # [G, G]
    groups = len(points)
    return nearest.sum() / (groups * (groups - 1))  # the diagonal is 0


def matching_distances(points: Tensor, matched: Tensor, objects: Tensor | int) -> Tensor:
    """The terms of eq. 7, the mean over all pairs of groups: [M]; NaN for an object that no two groups have matched.

    points: [G, N, 2].
    matched: [G, N], the object of each query, -1 for none.
    objects: M, in this image.
    """
    numbers = torch.arange(int(objects))
    hits = (matched[:, None] == numbers[:, None]).double()  # [G, M, N]; an object has at most one query of a group
    found, where = hits.sum(-1), hits @ points.double()
    apart = (where[:, None] - where[None]).norm(dim=-1)  # [G, G, M]
    pairs = (found[:, None] * found[None]).where(~torch.eye(len(points), dtype=torch.bool)[..., None], 0)
    return (apart * pairs).sum((0, 1)) / pairs.sum((0, 1))


def _lines(subjects: Sequence[Subject], rows: Sequence[dict[str, Any]]) -> Any:
    """Figure 4."""
    figure, axes = plots(1, 1)
    every = labels(subjects)
    for subject in subjects:
        own = [row for row in rows if row["run"] == subject.name]
        first = subject is next(one for one in subjects if one.label == subject.label)
        for key, style in (("md", "-"), ("pd", "--")):
            text = f"{key.upper()}, {subject.label}" if first else None
            how = {"linestyle": style, "marker": "o", "markersize": 3, "color": colour(every.index(subject.label))}
            axes[0, 0].plot([row["step"] for row in own], [row[key] for row in own], label=text, **how)
    axes[0, 0].set_ylim(bottom=0)
    named(axes[0, 0], "distances of groups", "step", "share of the image")
    return figure


def _points(points: dict[str, Tensor]) -> Any:
    """Figure 3, a plot per label."""
    figure, axes = plots(1, len(points), 4, 4)
    for axis, (label, groups) in zip(axes[0], points.items(), strict=True):
        for number, own in enumerate(groups):
            axis.scatter(*own.numpy().T, s=8, color=colour(number), alpha=0.8)
        axis.set(xlim=(0, 1), ylim=(1, 0), aspect="equal")
        named(axis, f"{label}: {len(groups)} groups", legend=False)
    return figure
