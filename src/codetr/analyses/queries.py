"""Original and customised positive queries (Co-DETR, sec. 4.4, fig. 7a and 7b; appendix A, "The number of customized
positive queries").

An original positive is a query of the main group that is matched to an object, a customised one is a positive
coordinate of an auxiliary head. Figure 7a shows both for one object of an image. Figure 7b has the mean distance of
customised positives from the original positive of their object, and from the original negatives of their image.
Positives per object is their number over that of the objects.

Left open by the paper, and chosen here: the place of a query, where it starts (its reference point, or the centre of
its anchor or proposal); distances, as shares of the image's sides; the object of 7a, the largest; and every customised
positive counts alike. Positives are the head's, before the collaborative group takes at most `max_queries` of them;
those of Faster R-CNN are its sampled regions, the objects themselves among them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from codetr.analyses.drawing import bars, colour, named, pixels, plots, show
from codetr.analyses.matched import objects_of_queries, places
from codetr.analyses.subject import Result, Snapshot, Subject, by_label
from codetr.errors import UserError
from codetr.nn.boxes import center_size
from codetr.types import MAIN, AuxiliaryHead, Batch, Positives, Targets

COLOURS = {"faster_rcnn": "tab:blue", "atss": "tab:orange"}  # of figure 7a


@dataclass
class Counted:
    """Of one head, over images.

    from_positive: sum over `matched` positives, whose object has an original one. from_negative: sum over `compared`
    positives, in whose image are original negatives, of the mean distance from them.
    """

    objects: int = 0
    positives: int = 0
    from_positive: float = 0.0
    matched: int = 0
    from_negative: float = 0.0
    compared: int = 0

    def numbers(self) -> dict[str, float]:
        return {
            "positives_per_object": self.positives / max(1, self.objects),
            "to_original_positive": self.from_positive / max(1, self.matched),
            "to_original_negatives": self.from_negative / max(1, self.compared),
        }


@dataclass
class Example:
    """One object in an image: box, xyxy in pixels; places [n, 2] of its original positive and of each head's."""

    image: np.ndarray
    box: list[float]
    original: Tensor
    customised: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Queries:
    """examples: images that are drawn, of the first run of every label."""

    examples: int

    def __call__(self, subjects: Sequence[Subject]) -> Result:
        rows: list[dict[str, Any]] = []
        examples: dict[str, list[Example]] = {}
        for subject in subjects:
            snapshot = subject.final()
            if not snapshot.detector.heads:
                raise UserError(f"{subject.name}: has no auxiliary heads, and so no customised positives")
            counted = {name: Counted() for name in snapshot.detector.heads}
            drawn: list[Example] = []
            for batch in subject.batches():
                drawn += self._look(snapshot, batch, counted, self.examples - len(drawn))
            examples.setdefault(subject.label, drawn)
            rows += [
                {"run": subject.name, "label": subject.label, "head": name, **own.numbers()}
                for name, own in counted.items()
            ]
        numbers = _summary(subjects, rows)
        return Result(rows, numbers, {"": _places(examples), "_distances": _distances(numbers)})

    @torch.no_grad()
    def _look(self, snapshot: Snapshot, batch: Batch, counted: dict[str, Counted], wanted: int) -> list[Example]:
        """Count a batch; returns as many of its images as are wanted."""
        detector, targets = snapshot.detector, batch.targets
        output = detector(batch.images, batch.padding)
        assert detector.adapter is not None, "heads have one"
        assert output.memory is not None, "a detector has one"
        pyramid = detector.adapter(output.memory)
        original = places(detector, output, MAIN)
        matched = objects_of_queries(output, MAIN, targets, snapshot.cost)
        examples = [_example(batch, i, original, matched) for i in _with_objects(targets)[: max(0, wanted)]]
        for name, head in cast("Mapping[str, AuxiliaryHead]", detector.heads).items():
            positives = head(pyramid, targets).positives
            for i in range(len(matched)):
                own, of = customised(positives, targets, i)
                count(counted[name], original[i], matched[i], own, of, int(targets.counts[i]))
            for i, one in zip(_with_objects(targets), examples, strict=False):
                own, of = customised(positives, targets, i)
                one.customised[name] = own[of == _largest(targets, i)].cpu()
        return examples


def customised(positives: Positives, targets: Targets, i: int) -> tuple[Tensor, Tensor]:
    """A head's positives in image i: where they are, as shares of the image, [n, 2], and the object of each, [n]."""
    mine = positives.positive[i]
    height, width = targets.frames.sizes[i].tolist()
    centres = center_size(positives.boxes_xyxy[i][mine])[0]
    objects = targets.boxes_xyxy[i].masked_fill(~targets.valid[i][:, None], torch.inf)
    gaps = (positives.target_boxes_xyxy[i][mine][:, None] - objects).abs().sum(-1)  # the boxes are copies: 0
    return centres / centres.new_tensor([width, height]), gaps.argmin(1)


def count(counted: Counted, original: Tensor, matched: Tensor, own: Tensor, of: Tensor, objects: int) -> None:
    """Add an image. original: [N, 2] with the object of each, [N], -1 for none. own: [n, 2] with theirs, [n]."""
    counted.objects += objects
    counted.positives += len(own)
    apart = torch.cdist(own.double(), original.double())
    same = of[:, None] == matched
    counted.from_positive += float(apart[same].sum())
    counted.matched += int(same.sum())
    negatives = matched < 0
    if negatives.any():
        counted.from_negative += float(apart[:, negatives].mean(1).sum())
        counted.compared += len(own)


def _with_objects(targets: Targets) -> list[int]:
    return (targets.counts > 0).nonzero()[:, 0].tolist()


def _largest(targets: Targets, i: int) -> int:
    return int((targets.boxes[i, :, 2:].prod(-1) * targets.valid[i]).argmax())


def _example(batch: Batch, i: int, original: Tensor, matched: Tensor) -> Example:
    chosen = _largest(batch.targets, i)
    box = batch.targets.boxes_xyxy[i, chosen].tolist()
    return Example(pixels(batch, i), box, original[i][matched[i] == chosen].cpu())


def _summary(subjects: Sequence[Subject], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Number -> head -> label -> mean and spread over the runs that have the head."""
    summary: dict[str, Any] = {}
    for key in Counted().numbers():
        for head in dict.fromkeys(row["head"] for row in rows):
            values = {row["run"]: row[key] for row in rows if row["head"] == head}
            having = [subject for subject in subjects if subject.name in values]
            summary.setdefault(key, {})[head] = by_label(having, [values[subject.name] for subject in having])
    return summary


def _colour(name: str, number: int) -> str:
    return next((own for known, own in COLOURS.items() if name.startswith(known)), colour(number + 4))


def _places(examples: dict[str, list[Example]]) -> Any:
    """Figure 7a: a row per label. Red: the original positive."""
    figure, axes = plots(len(examples), max(1, *(len(own) for own in examples.values())), 2.3, 2.5)
    for line, (label, own) in zip(axes, examples.items(), strict=True):
        for axis in line:
            axis.set_axis_off()
        for column, (axis, one) in enumerate(zip(line, own, strict=False)):
            show(axis, one.image, label if column == 0 else "")
            size = np.array(one.image.shape[1::-1])
            x0, y0, x1, y1 = one.box
            axis.plot([x0, x1, x1, x0, x0], [y0, y0, y1, y1, y0], color="lime", linewidth=1.5)
            for number, (name, points) in enumerate(one.customised.items()):
                axis.scatter(*(points.numpy() * size - 0.5).T, s=9, color=_colour(name, number), label=name)
            axis.scatter(*(one.original.numpy() * size - 0.5).T, s=28, color="red", marker="*", label="Hungarian")
            axis.set(xlim=(-0.5, size[0] - 0.5), ylim=(size[1] - 0.5, -0.5))
    for axis, own in zip(axes[:, 0], examples.values(), strict=True):
        if own:
            axis.legend(fontsize="x-small", loc="lower left")
    return figure


def _distances(numbers: dict[str, Any]) -> Any:
    """Figure 7b, a plot per head."""
    heads = list(numbers["to_original_positive"])
    figure, axes = plots(1, len(heads), 3.6, 3.6)
    for axis, head in zip(axes[0], heads, strict=True):
        for number, key in enumerate(("to_original_positive", "to_original_negatives")):
            bars(axis, numbers[key][head], number, 2, key.replace("_", " "))
        named(axis, f"customised positives of {head}", y="mean distance, share of the image")
    return figure
