"""The region proposal network (Faster R-CNN, sec. 3.1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, linear, relu

from codetr.assign import BACKGROUND
from codetr.assign.max_iou import assign_max_iou
from codetr.assign.sampling import sample_both
from codetr.heads.common import assigned_boxes, flatten, init_normal, top_per_level, weighted
from codetr.nn.anchors import AnchorGrid
from codetr.nn.boxes import BoxCoder, clip
from codetr.ops.gather import take
from codetr.ops.nms import best_after_nms
from codetr.ops.normaliser import normaliser
from codetr.types import Pyramid, Targets


@dataclass(frozen=True)
class ProposalSelection:
    """The best `per_level` anchors of each level, suppressed at `nms_iou` within their level, the best `count`."""

    per_level: int
    nms_iou: float
    count: int


class RPN(nn.Module):
    """Object or not, and box deltas, for every anchor.

    positive_iou, negative_iou, low_quality_iou: thresholds of the assignment.
    num_samples: anchors per image in the loss, at most `positive_fraction` of them positive.
    """

    def __init__(
        self,
        width: int,
        anchor_scales: tuple[float, ...],
        anchor_ratios: tuple[float, ...],
        positive_iou: float,
        negative_iou: float,
        low_quality_iou: float,
        num_samples: int,
        positive_fraction: float,
        class_weight: float,
        l1_weight: float,
    ) -> None:
        super().__init__()
        self.grid = AnchorGrid(anchor_scales, anchor_ratios)
        self.coder = BoxCoder((1.0, 1.0, 1.0, 1.0))
        self.thresholds = (positive_iou, negative_iou, low_quality_iou)
        self.num_samples, self.most_positive = num_samples, int(num_samples * positive_fraction)
        self.weights = {"class": class_weight, "l1": l1_weight}
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.objectness = nn.Conv2d(width, self.grid.per_cell, 1)
        self.deltas = nn.Conv2d(width, self.grid.per_cell * 4, 1)
        init_normal(self, 0.01)

    def forward(self, pyramid: Pyramid) -> tuple[Tensor, Tensor]:
        """Logits [B, N] and deltas [B, N, 4], float32."""
        cells = relu(flatten([self.conv(level) for level in pyramid.levels], 1))
        logits, deltas = (linear(cells, own.weight.flatten(1), own.bias) for own in (self.objectness, self.deltas))
        return logits.flatten(1).float(), deltas.reshape(len(deltas), -1, 4).float()

    def losses(self, logits: Tensor, deltas: Tensor, pyramid: Pyramid, targets: Targets) -> dict[str, Tensor]:
        anchors, boxes = self.grid.every(pyramid), targets.boxes_xyxy
        inside = self.grid.valid(pyramid, targets.frames.sizes)
        matched_index = assign_max_iou(anchors, inside, boxes, targets.valid, *self.thresholds)
        positive, negative = sample_both(
            matched_index >= 0, matched_index == BACKGROUND, self.most_positive, self.num_samples
        )
        count = positive.sum(1).clamp(min=1) + negative.sum(1).clamp(min=1)
        count = normaliser(count.sum())
        entropy = binary_cross_entropy_with_logits(logits, positive.to(logits), reduction="none")
        l1 = (deltas - self.coder.encode(anchors, assigned_boxes(boxes, matched_index))).abs().sum(-1)
        losses = {
            "class": entropy.where(positive | negative, 0).sum() / count,
            "l1": l1.where(positive, 0).sum() / count,
        }
        return weighted(losses, self.weights)

    @torch.no_grad()
    def propose(
        self, logits: Tensor, deltas: Tensor, pyramid: Pyramid, sizes: Tensor, selection: ProposalSelection
    ) -> tuple[Tensor, Tensor]:
        """Boxes [B, P, 4] xyxy in network pixels, best first, and which of them are real [B, P]."""
        of_levels = [cells * self.grid.per_cell for cells in pyramid.cells]
        best, levels = top_per_level(logits, of_levels, selection.per_level)
        boxes = clip(self.coder.decode(self.grid.every(pyramid)[best], take(deltas, best)), sizes)
        valid = (boxes[..., 2:] > boxes[..., :2]).all(-1)
        keep, kept = best_after_nms(boxes, logits.gather(1, best), levels, valid, selection.nms_iou, selection.count)
        return take(boxes, keep), kept
