"""What the one-stage heads share: towers, and the way from dense predictions to detections."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn

from codetr.heads.common import PRIOR, detections, top_per_level
from codetr.nn.anchors import clip
from codetr.ops.gather import take
from codetr.ops.nms import best_after_nms
from codetr.types import Detections


def tower(width: int, num_convs: int, num_groups: int) -> nn.Sequential:
    """3x3 convolutions with group norm and ReLU."""
    layers: list[nn.Module] = []
    for _ in range(num_convs):
        layers += [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.GroupNorm(num_groups, width), nn.ReLU(True)]
    return nn.Sequential(*layers)


def start_at_prior(classes: nn.Conv2d) -> None:
    """Every class begins at probability PRIOR (Focal loss, sec. 3.3)."""
    assert classes.bias is not None
    nn.init.constant_(classes.bias, -math.log((1 - PRIOR) / PRIOR))


@dataclass(frozen=True)
class Selection:
    """From dense predictions to detections. candidates_per_level: (cell, class) pairs that reach the suppression.
    nms_iou: class-wise. max_detections: per image."""

    candidates_per_level: int
    nms_iou: float
    max_detections: int

    def __call__(
        self, probability: Tensor, quality: Tensor | None, boxes: Tensor, level_sizes: list[int], sizes: Tensor
    ) -> list[Detections]:
        """probability: [B, N, K], which chooses the candidates. quality: [B, N], by which their scores are multiplied.
        boxes: [B, N, 4] xyxy in network pixels. level_sizes: candidates per level. sizes: [B, 2] of the images."""
        num_classes = probability.shape[-1]
        flat = probability.flatten(1)
        best, _ = top_per_level(flat, [n * num_classes for n in level_sizes], self.candidates_per_level)
        cell, labels = best // num_classes, best % num_classes
        scores = flat.gather(1, best)
        if quality is not None:
            scores = scores * quality.gather(1, cell)
        boxes = clip(take(boxes, cell), sizes)
        valid = (boxes[..., 2:] > boxes[..., :2]).all(-1)
        keep, kept = best_after_nms(boxes, scores, labels, valid, self.nms_iou, self.max_detections)
        return detections(scores.gather(1, keep), labels.gather(1, keep), take(boxes, keep), kept)
