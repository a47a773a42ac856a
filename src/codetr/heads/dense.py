"""What the one-stage heads share: the way from a pyramid to dense predictions, and from these to detections."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from codetr.heads.common import PRIOR, detections, flatten, init_normal, top_per_level, tower
from codetr.nn.boxes import clip
from codetr.nn.class_rows import ClassRows, by_class
from codetr.ops.gather import take
from codetr.ops.nms import best_after_nms
from codetr.types import Detections, Pyramid


class Dense(NamedTuple):
    """What a head predicts for every candidate of all levels, float32.

    logits: [B, N, K] of the classes.
    boxes: [B, N, D], the values of which the head makes boxes.
    quality: [B, N] logits of the box's quality (centerness, IoU); None for a head that does not predict one.
    """

    logits: Tensor
    boxes: Tensor
    quality: Tensor | None


class DensePredictor(nn.Module):
    """Two towers of convolutions, one for classes and one for boxes, that all levels share.

    width: channels of the pyramid.
    num_convs, num_groups: convolutions of each tower, and groups of their norms.
    per_cell: candidates per cell.
    box_values: D, values per box.
    num_levels: the boxes' values get a learned factor per level, of which there are so many; None for no factors.
    quality: also predict a quality, from the boxes' tower.
    """

    def __init__(
        self,
        width: int,
        num_classes: int,
        num_convs: int,
        num_groups: int,
        per_cell: int = 1,
        box_values: int = 4,
        num_levels: int | None = None,
        quality: bool = False,
    ) -> None:
        super().__init__()
        self.per_cell = per_cell
        self.class_tower, self.box_tower = (tower(width, num_convs, num_groups) for _ in range(2))
        self.classes = by_class(nn.Conv2d(width, per_cell * num_classes, 3, padding=1), ClassRows(repeats=per_cell))
        self.boxes = nn.Conv2d(width, per_cell * box_values, 3, padding=1)
        self.quality = nn.Conv2d(width, per_cell, 3, padding=1) if quality else None
        self.scales = None if num_levels is None else nn.Parameter(torch.ones(num_levels))
        init_normal(self, 0.01)
        nn.init.constant_(self.classes.bias, -math.log((1 - PRIOR) / PRIOR))  # type: ignore[arg-type]

    def forward(self, pyramid: Pyramid) -> Dense:
        """Raises ValueError where the pyramid has another number of levels than `num_levels`."""
        if self.scales is not None and len(self.scales) != len(pyramid.levels):
            raise ValueError(f"the head has num_levels={len(self.scales)}, the pyramid {len(pyramid.levels)}")
        features = [self.box_tower(level) for level in pyramid.levels]
        logits = flatten([self.classes(self.class_tower(level)) for level in pyramid.levels], self.per_cell).float()
        boxes = flatten([self.boxes(x) for x in features], self.per_cell).float()
        if self.scales is not None:
            levels = zip(self.scales.unbind(), pyramid.cells, strict=True)
            boxes = boxes * torch.cat([scale.expand(count * self.per_cell) for scale, count in levels])[:, None]
        if self.quality is None:
            return Dense(logits, boxes, None)
        quality = flatten([self.quality(x) for x in features], self.per_cell)
        return Dense(logits, boxes, quality[..., 0].float())


@dataclass(frozen=True)
class Selection:
    """Chooses detections among dense predictions.

    candidates_per_level: (cell, class) pairs that reach the suppression.
    nms_iou: class-wise.
    max_detections: per image.
    """

    candidates_per_level: int
    nms_iou: float
    max_detections: int

    def __call__(
        self, probability: Tensor, quality: Tensor | None, boxes: Tensor, pyramid: Pyramid, sizes: Tensor
    ) -> list[Detections]:
        """Choose among candidates that are equally many in every cell of the pyramid, level by level.

        probability: [B, N, K], which chooses the candidates.
        quality: [B, N], by which their scores are multiplied.
        boxes: [B, N, 4] xyxy in network pixels.
        sizes: [B, 2] (height, width) of the images.
        """
        num_classes = probability.shape[-1]
        flat, cells = probability.flatten(1), pyramid.cells
        of_levels = [flat.shape[1] // sum(cells) * number for number in cells]
        best, _ = top_per_level(flat, of_levels, self.candidates_per_level)
        cell, labels = best // num_classes, best % num_classes
        scores = flat.gather(1, best)
        if quality is not None:
            scores = scores * quality.gather(1, cell)
        boxes = clip(take(boxes, cell), sizes)
        valid = (boxes[..., 2:] > boxes[..., :2]).all(-1)
        keep, kept = best_after_nms(boxes, scores, labels, valid, self.nms_iou, self.max_detections)
        return detections(scores.gather(1, keep), labels.gather(1, keep), take(boxes, keep), kept)
