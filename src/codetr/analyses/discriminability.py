"""Discriminability of encoder and decoder: score maps and IoF-IoB curves (Co-DETR, sec. 3.4, eq. 7 and 8, fig. 2, 3).

The score of a cell is the l2 norm of its features; each level's map is resized to the image and divided by its maximum,
and D is the mean over levels (eq. 7). IoF(S) is the share of the foreground where D > S (eq. 8), IoB(S) that of the
background; the curve over S is above another's where objects stand out more. The area below it is the probability that
a point of the foreground has a higher score than one of the background: 0.5 by chance.

Of the decoder (end of sec. 3.4) a cell's score is what the queries that are matched to objects attend to it, with all
heads together; deformable attention has its weights at points, which are shared out to the cells around them.

Left open by the paper, and chosen here or by an option: the foreground (boxes or masks); the mean over images, or all
pixels together (`pooled`); the decoder's layer, and whether its queries are taken together, or each against its own
object (`each_query`). S is swept in steps much finer than the table shows: behind the encoder's last LayerNorm norms
differ by a few percent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from codetr.analyses.drawing import colour, named, pixels, plots, show
from codetr.analyses.matched import objects_of_queries
from codetr.analyses.recording import recorded
from codetr.analyses.subject import Result, Snapshot, Subject, by_label, labels
from codetr.errors import UserError
from codetr.types import MAIN, Batch, Shapes

POINTS = 101  # of a curve in the table


class Scored(NamedTuple):
    """D [h, w] of image `image` of a batch, in 0..1, and where its foreground is [h, w] bool."""

    image: int
    score: Tensor
    foreground: Tensor


class Example(NamedTuple):
    """pixels: [h, w, 3]."""

    pixels: np.ndarray
    scored: Scored


@dataclass(frozen=True)
class Discriminability:
    """of: `encoder` or `decoder`.
    foreground: `boxes`, or `masks` where the data set reads them (+data.val_masks=true).
    pooled: pixels of all images count alike; otherwise images do.
    layer: of the decoder, whose attention is looked at; -1: the last.
    each_query: every matched query against its own object, instead of all of them together against all objects.
    thresholds: values of S, evenly from 0 to 1.
    examples: images that are drawn.
    """

    of: Literal["encoder", "decoder"]
    foreground: Literal["boxes", "masks"]
    pooled: bool
    layer: int
    each_query: bool
    thresholds: int
    examples: int

    def __call__(self, subjects: Sequence[Subject]) -> Result:
        thresholds = torch.linspace(0, 1, self.thresholds)
        curves: list[Tensor] = []
        examples: dict[str, list[Example]] = {}
        for subject in subjects:
            curve, drawn = self._curve(subject, thresholds)
            curves.append(curve)
            examples.setdefault(subject.label, drawn)
        rows = [
            {"run": subject.name, "label": subject.label, "threshold": float(s), "iof": float(iof), "iob": float(iob)}
            for subject, curve in zip(subjects, curves, strict=True)
            for chosen in [spread(curve[1], POINTS)]
            for s, iof, iob in zip(thresholds[chosen], *curve[:, chosen], strict=True)
        ]
        areas = by_label(subjects, [area(*curve) for curve in curves])
        pictures = {"": _curves(subjects, curves, areas, self.of), "_maps": _maps(examples)}
        return Result(rows, {"area": areas}, pictures)

    def _curve(self, subject: Subject, thresholds: Tensor) -> tuple[Tensor, list[Example]]:
        """IoF and IoB over the thresholds, [2, T], and images that are drawn."""
        snapshot = subject.final()
        total, weight = torch.zeros(2, len(thresholds), dtype=torch.double), torch.zeros(2, 1, dtype=torch.double)
        drawn: dict[tuple[int, int], Example] = {}
        for number, batch in enumerate(subject.batches()):
            for one in self._scored(snapshot, batch):
                sizes = torch.stack([one.foreground.sum(), (~one.foreground).sum()])[:, None].double()
                own = sizes if self.pooled else torch.ones_like(sizes)
                total += iof_iob(one.score, one.foreground, thresholds) * own
                weight += own
                if len(drawn) < self.examples:
                    drawn.setdefault((number, one.image), Example(pixels(batch, one.image), one))
        if not weight.any():
            raise UserError(f"{subject.name}: no image has both objects and background; choose others, images=...")
        return total / weight, list(drawn.values())

    @torch.no_grad()
    def _scored(self, snapshot: Snapshot, batch: Batch) -> Iterator[Scored]:
        """Of images that have both foreground and background."""
        if self.of == "encoder":
            memory = snapshot.detector.encode(batch.images, batch.padding)
            norms = memory.tokens.float().norm(dim=-1)
            wanted = [(i, norms[i], batch.targets.valid[i]) for i in range(len(norms))]
        else:
            with recorded(snapshot.detector.decoder, self.layer) as maps:
                output = snapshot.detector(batch.images, batch.padding)
            assert output.memory is not None, "a detector has one"
            matched, memory = objects_of_queries(output, MAIN, batch.targets, snapshot.cost), output.memory
            wanted = [one for i in range(len(matched)) for one in self._attended(i, maps[0][i], matched[i], batch)]
        canvas = (batch.images.shape[-2], batch.images.shape[-1])
        for i, scores, which in wanted:
            height, width = batch.frames.sizes[i].tolist()
            foreground = self._foreground(batch, i, which)
            if foreground.any() and not foreground.all():
                score = score_map(scores, memory.spatial_shapes, canvas, (height, width))
                yield Scored(i, score.cpu(), foreground.cpu())

    def _attended(self, i: int, attention: Tensor, matched: Tensor, batch: Batch) -> list[tuple[int, Tensor, Tensor]]:
        """Scores [S] of image i, with the objects [M] that they should tell from the rest. attention: [N, S]."""
        if not self.each_query:
            return [(i, attention[matched >= 0].sum(0), batch.targets.valid[i])]
        numbers = torch.arange(batch.targets.valid.shape[1], device=matched.device)
        return [(i, attention[q], numbers == matched[q]) for q in (matched >= 0).nonzero()[:, 0].tolist()]

    def _foreground(self, batch: Batch, i: int, which: Tensor) -> Tensor:
        height, width = batch.frames.sizes[i].tolist()
        if self.foreground == "boxes":
            return inside(batch.targets.boxes_xyxy[i][which], (height, width))
        if self.of == "decoder" and self.each_query:
            raise UserError("figure.foreground=masks: which mask is a query's object, is not told; each_query=false")
        return _in_masks(batch, i, (height, width))


def score_map(scores: Tensor, shapes: Shapes, canvas: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Eq. 7, of one image: [h, w] in 0..1.

    scores: [S] of the cells of all levels, not negative.
    shapes: (height, width) per level.
    canvas: (height, width) of the padded image, which the levels cover, and `size` of the image in it.
    """
    maps = []
    for level, shape in zip(scores.split([h * w for h, w in shapes]), shapes, strict=True):
        resized = interpolate(level.view(1, 1, *shape), canvas, mode="bilinear", align_corners=False)
        own = resized[0, 0, : size[0], : size[1]]
        maps.append(own / own.max().clamp(min=torch.finfo(own.dtype).tiny))
    return torch.stack(maps).mean(0)


def iof_iob(score: Tensor, foreground: Tensor, thresholds: Tensor) -> Tensor:
    """Eq. 8: shares of the foreground, and of the background, whose score is above each threshold: [2, T].

    score: [h, w]. foreground: [h, w] bool.
    """
    return torch.stack([_above(score[foreground], thresholds), _above(score[~foreground], thresholds)])


def _above(values: Tensor, thresholds: Tensor) -> Tensor:
    below = torch.searchsorted(values.sort().values, thresholds.to(values), right=True)
    return (len(values) - below).double() / len(values)


def area(iof: Tensor, iob: Tensor) -> float:
    """Below the curve of IoF over IoB, both [T] falling, which is drawn out to (1, 1) and (0, 0)."""
    ends = (torch.ones(1).to(iof), torch.zeros(1).to(iof))
    y, x = (torch.cat([ends[0], own, ends[1]]).flip(0) for own in (iof, iob))
    return float(torch.trapezoid(y, x))


def spread(iob: Tensor, points: int) -> Tensor:
    """Numbers of at most so many thresholds, over which IoB falls evenly. iob: [T], falling."""
    wanted = torch.linspace(1, 0, points).to(iob)
    return torch.searchsorted(-iob, -wanted).clamp(max=len(iob) - 1).unique()


def inside(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """[h, w] bool, True on pixels whose middle is in a box. boxes: [m, 4] xyxy in pixels. size: (h, w)."""
    y, x = (torch.arange(length, device=boxes.device) + 0.5 for length in size)
    rows = (y >= boxes[:, 1:2]) & (y < boxes[:, 3:4])
    columns = (x >= boxes[:, :1]) & (x < boxes[:, 2:3])
    return (rows[:, :, None] & columns[:, None]).any(0)


def _in_masks(batch: Batch, i: int, size: tuple[int, int]) -> Tensor:
    """[h, w] bool, True on the objects of image i. Raises UserError where the data set does not read masks."""
    from pycocotools import mask as coco_mask

    if "rle" not in batch.truth[i]:
        raise UserError("figure.foreground=masks: the data set reads no masks; add +data.val_masks=true")
    found = torch.zeros(size, dtype=torch.bool, device=batch.images.device)
    if not batch.truth[i]["rle"]:
        return found
    whole = torch.from_numpy(coco_mask.decode(batch.truth[i]["rle"])).any(-1)
    height, width = (batch.frames.file_sizes[i] * batch.frames.scale[i]).round().int().tolist()
    shrunk = interpolate(whole[None, None].float(), (height, width), mode="nearest-exact")[0, 0] > 0
    found[:height, :width] = shrunk[: size[0], : size[1]].to(found.device)
    return found


def _curves(subjects: Sequence[Subject], curves: Sequence[Tensor], areas: dict[str, Any], of: str) -> Any:
    figure, axes = plots(1, 1)
    every = labels(subjects)
    for subject, (iof, iob) in zip(subjects, curves, strict=True):
        first = subject is next(one for one in subjects if one.label == subject.label)
        text = f"{subject.label}: {areas[subject.label]['mean']:.3f}" if first else None
        axes[0, 0].plot(iob.numpy(), iof.numpy(), color=colour(every.index(subject.label)), label=text, alpha=0.8)
    axes[0, 0].plot([0, 1], [0, 1], color="0.7", linestyle=":")
    named(axes[0, 0], f"{of}: area below the curve", "IoB", "IoF")
    return figure


def _maps(examples: dict[str, list[Example]]) -> Any:
    """The colours of each map go from its least to its greatest score."""
    first = next(iter(examples.values()))
    figure, axes = plots(len(first), 1 + len(examples), 2.0, 2.0)
    for row, example in enumerate(first):
        show(axes[row, 0], example.pixels)
    for column, (label, own) in enumerate(examples.items(), 1):
        for row, (_, one) in enumerate(own):
            show(axes[row, column], one.score.numpy(), label if row == 0 else "", cmap="jet")
            axes[row, column].contour(one.foreground.numpy(), levels=[0.5], colors="white", linewidths=0.8)
    return figure
