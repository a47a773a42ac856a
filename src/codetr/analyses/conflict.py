"""Conflict of heads: distances between what they look at (Co-DETR, sec. 4.4 and appendix A, eq. 9 to 12, fig. 6, 8, 9).

C(H_i(I)) is the class activation map of head i on image I: Grad-CAM on the encoder's output, as a distribution over its
cells. S_ij is the mean over images of KL(C(H_i(I)), C(H_j(I))) (eq. 9 and 11), S_i the mean over the other heads j of
(S_ij + S_ji) / 2 (eq. 10 and 12). One number for a detector (fig. 6): the mean S_i of its auxiliary heads, or, where
there is one only, its distance from the decoder.

Left open by the paper, and chosen here or by an option: whose gradient it is, the log odds of the `top` detections of
the head, as its `detect` finds them; the map of several levels, each divided by its maximum, resized to the finest and
averaged, as in eq. 7; and the share of a uniform distribution that is added so that the divergence is finite (`floor`),
on which the size of all distances depends, so that only those of equal floors can be compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from codetr.analyses.discriminability import score_map
from codetr.analyses.drawing import bars, named, pixels, plots, show
from codetr.analyses.subject import Result, Snapshot, Subject, by_label
from codetr.errors import UserError
from codetr.names import plotted
from codetr.nn.boxes import best_pairs
from codetr.types import MAIN, AuxiliaryHead, Batch, Memory

DECODER = "decoder"


@dataclass(frozen=True)
class Conflict:
    """top: detections of an image whose scores count.
    floor: share of the uniform distribution in every map.
    examples: images that are drawn.
    """

    top: int
    floor: float
    examples: int

    def __call__(self, subjects: Sequence[Subject]) -> Result:
        matrices: dict[str, Tensor] = {}
        heads: dict[str, list[str]] = {}
        examples: dict[str, list[tuple[np.ndarray, dict[str, Tensor]]]] = {}
        for subject in subjects:
            snapshot, relations = subject.final(), []
            if not snapshot.detector.heads:
                raise UserError(f"{subject.name}: has no auxiliary heads, with which its decoder could be in conflict")
            drawn = examples.setdefault(subject.label, [])
            for batch in subject.batches():
                for i, maps in enumerate(self._maps(snapshot, batch)):
                    relations.append(divergences(distributions(torch.stack(list(maps.values())), self.floor)))
                    if len(drawn) < self.examples:
                        drawn.append((pixels(batch, i), maps))
            heads[subject.name] = [DECODER, *snapshot.detector.heads]
            matrices[subject.name] = torch.stack(relations).nanmean(0)
        rows = [
            {"run": subject.name, "label": subject.label, "head": a, "other": b, "divergence": float(value)}
            for subject in subjects
            for a, values in zip(heads[subject.name], matrices[subject.name], strict=True)
            for b, value in zip(heads[subject.name], values, strict=True)
        ]
        means = by_label(subjects, [mean_distance(matrices[subject.name]) for subject in subjects])
        numbers = {
            "mean_distance": means,
            "distance_of_head": {
                name: dict(zip(heads[name], distances(matrix).tolist(), strict=True))
                for name, matrix in matrices.items()
            },
        }
        pictures = {"": _matrices(subjects, heads, matrices), "_mean": _means(means), "_maps": _maps(examples)}
        return Result(rows, numbers, pictures)

    def _maps(self, snapshot: Snapshot, batch: Batch) -> list[dict[str, Tensor]]:
        """Of every image the map [h, w] of each head, on the cells of the finest level."""
        with torch.enable_grad():
            memory, scores = self._scores(snapshot, batch)
            cams = {name: grad_cam(score, memory) for name, score in scores.items()}
        shapes = memory.spatial_shapes
        sizes = memory.valid_sizes[:, 0].tolist()
        return [
            {name: score_map(cam[i], shapes, shapes[0], (size[0], size[1])).cpu() for name, cam in cams.items()}
            for i, size in enumerate(sizes)
        ]

    def _scores(self, snapshot: Snapshot, batch: Batch) -> tuple[Memory, dict[str, Tensor]]:
        """The memory, and of every head the sum of its best detections' log odds, which depends on it."""
        detector, sizes = snapshot.detector, batch.frames.sizes
        with torch.no_grad():
            encoded = detector.encode(batch.images, batch.padding)
        memory = replace(encoded, tokens=encoded.tokens.detach().requires_grad_())
        main = detector.decode(memory)[MAIN].last
        found = {DECODER: list(best_pairs(main, sizes, self.top)[0])}
        assert detector.adapter is not None, "heads have one"
        pyramid = detector.adapter(memory)
        for name, head in cast("Mapping[str, AuxiliaryHead]", detector.heads).items():
            found[name] = [one.scores for one in head.detect(pyramid, sizes)]
        scores = {name: torch.cat([one[: self.top] for one in own]).logit(1e-6).sum() for name, own in found.items()}
        for name, score in scores.items():
            if not score.requires_grad:
                raise UserError(f"{name}: its `detect` gives scores without a gradient; take torch.no_grad from it")
        return memory, scores


def grad_cam(score: Tensor, memory: Memory) -> Tensor:
    """Grad-CAM (arXiv 1610.02391, eq. 1 and 2) on the tokens of a memory: [B, S], nothing on padding.

    score: a sum over images. Of every image and level the weight of a channel is the mean gradient of the score over
    its cells; a cell has the sum of its channels by these weights, or 0 where that is negative.
    """
    (slopes,) = torch.autograd.grad(score, memory.tokens, retain_graph=True)
    cells = [height * width for height, width in memory.spatial_shapes]
    parts = zip(memory.tokens.detach().split(cells, 1), slopes.split(cells, 1), strict=True)
    cam = torch.cat([(tokens * slope.mean(1, keepdim=True)).sum(-1) for tokens, slope in parts], 1)
    return cam.relu().masked_fill(memory.padding, 0)


def distributions(maps: Tensor, floor: float) -> Tensor:
    """Maps [H, h, w] as distributions [H, h * w], each with the share `floor` of the uniform one; NaN where a map is
    zero everywhere: a head that found nothing is in conflict with none."""
    flat = maps.flatten(1).double()
    total = flat.sum(1, keepdim=True)
    return ((1 - floor) * flat / total + floor / flat.shape[1]).where(total > 0, torch.nan)


def divergences(maps: Tensor) -> Tensor:
    """KL divergence of every two distributions [H, n], the first from the second: [H, H]."""
    logs = maps.log()
    return (maps[:, None] * (logs[:, None] - logs[None])).sum(-1)


def distances(matrix: Tensor) -> Tensor:
    """Eq. 10: of each of H heads the mean distance from the others, [H]. matrix: [H, H] with zeros on the diagonal."""
    return (matrix.sum(0) + matrix.sum(1)) / (2 * (len(matrix) - 1))


def mean_distance(matrix: Tensor) -> float:
    """Figure 6. matrix: [1 + K, 1 + K], the decoder first."""
    return float(distances(matrix if len(matrix) == 2 else matrix[1:, 1:]).mean())


def _matrices(subjects: Sequence[Subject], heads: Mapping[str, list[str]], matrices: Mapping[str, Tensor]) -> Any:
    """Of the first run of every label."""
    shown = list({subject.label: subject for subject in reversed(subjects)}.values())[::-1]
    figure, axes = plots(1, len(shown), 3.6, 3.4)
    for axis, subject in zip(axes[0], shown, strict=True):
        matrix, names = matrices[subject.name].numpy(), [plotted(name) for name in heads[subject.name]]
        axis.imshow(matrix, cmap="Blues", vmin=0)
        axis.grid(False)
        for (row, column), value in np.ndenumerate(matrix):
            ink = "white" if value > np.nanmax(matrix) / 2 else "black"
            axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize="small", color=ink)
        axis.set_xticks(range(len(names)), names, rotation=40, ha="right", fontsize="small")
        axis.set_yticks(range(len(names)), names, fontsize="small")
        named(axis, subject.label, legend=False)
    return figure


def _means(means: dict[str, dict[str, float | int | None]]) -> Any:
    figure, axes = plots(1, 1)
    bars(axes[0, 0], means)
    named(axes[0, 0], "average distance of heads")
    return figure


def _maps(examples: Mapping[str, list[tuple[np.ndarray, dict[str, Tensor]]]]) -> Any:
    """A row per label and image: the image, and where each head looks."""
    rows = [(label, *one) for label, own in examples.items() for one in own]
    figure, axes = plots(len(rows), 1 + max(len(maps) for _, _, maps in rows), 1.9, 1.9)
    for line, (label, image, maps) in zip(axes, rows, strict=True):
        for axis in line:
            axis.set_axis_off()
        show(line[0], image, label)
        for axis, (name, cam) in zip(line[1:], maps.items(), strict=False):
            show(axis, cam.numpy(), name, cmap="jet")
    return figure
