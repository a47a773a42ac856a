"""AP of every group of queries on its own (Group DETR, footnote 2: "every group can achieve similar results").

Self-attention never leaves a group, so that one pass over all of them predicts what each would with the others away;
`codetr eval group=2` takes the others away.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from codetr.analyses.drawing import colour, named, plots
from codetr.analyses.subject import Result, Subject, by_label, labels
from codetr.evaluation.inputs import inputs
from codetr.evaluation.mean_ap import detection_metric

KEYS = ("map", "map_50", "map_75")


@dataclass(frozen=True)
class EveryGroup:
    def __call__(self, subjects: Sequence[Subject]) -> Result:
        rows: list[dict[str, Any]] = []
        for subject in subjects:
            for number, (name, own) in enumerate(self._evaluated(subject).items(), 1):
                rows.append({"run": subject.name, "label": subject.label, "group": number, "name": name, **own})
        ranges = []
        for subject in subjects:
            every = [row["map"] for row in rows if row["run"] == subject.name]
            ranges.append(max(every) - min(every))
        return Result(rows, {"range_of_map": by_label(subjects, ranges)}, {"": _picture(subjects, rows)})

    @torch.no_grad()
    def _evaluated(self, subject: Subject) -> dict[str, dict[str, float]]:
        snapshot = subject.final()
        metrics = {name: detection_metric(list(snapshot.class_names)) for name in snapshot.detector.main_groups}
        for batch in subject.batches():
            output = snapshot.detector(batch.images, batch.padding, batch.targets)
            for name, metric in metrics.items():
                found = snapshot.postprocess(output.predictions[name].last, batch.frames.sizes)
                in_files = [one.to("cpu") for one in batch.frames.to_files(found)]
                metric.update(*inputs(batch.image_ids, in_files, batch.truth))
        for metric in metrics.values():
            metric.compute()
        return {n: {key: m.evaluations["bbox"].numbers[key] for key in KEYS} for n, m in metrics.items()}


def _picture(subjects: Sequence[Subject], rows: Sequence[dict[str, Any]]) -> Any:
    figure, axes = plots(1, 1)
    every = labels(subjects)
    for subject in subjects:
        own = [row for row in rows if row["run"] == subject.name]
        first = subject is next(one for one in subjects if one.label == subject.label)
        style = {"color": colour(every.index(subject.label)), "marker": "o", "linestyle": ""}
        groups, maps = [row["group"] for row in own], [row["map"] for row in own]
        axes[0, 0].plot(groups, maps, label=subject.label if first else None, **style)
    axes[0, 0].set_ylim(bottom=0)
    axes[0, 0].set_xticks(sorted({row["group"] for row in rows}))
    named(axes[0, 0], "every group alone", "group", "mAP")
    return figure
