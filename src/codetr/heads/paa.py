"""PAA as auxiliary head (Probabilistic Anchor Assignment, Kim and Lee 2020)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from codetr.assign.max_iou import assign_max_iou
from codetr.assign.paa import assign_paa
from codetr.heads.common import assigned, assigned_boxes, assigned_labels, flatten, weighted
from codetr.heads.dense import Dense, DensePredictor, Selection
from codetr.losses import Focal, giou_loss
from codetr.nn.anchors import AnchorGrid
from codetr.nn.boxes import BoxCoder, aligned_iou
from codetr.ops.normaliser import normaliser
from codetr.types import Detections, HeadOutput, Positives, Pyramid, Targets


class PAAHead(nn.Module):
    """One anchor per cell; candidates by IoU, of which the model's own losses choose; classes, box deltas and the
    predicted IoU, shared by all levels but for a scale of the deltas.

    Losses: focal loss; GIoU weighted by the IoU; cross entropy of the IoU. Its positive coordinates are the anchors,
    with the pyramid's features at their cells.

    candidate_iou: from here on an anchor is a candidate.
    topk: candidates per object and level.
    """

    def __init__(
        self,
        width: int,
        num_classes: int,
        num_levels: int,
        num_convs: int,
        num_groups: int,
        anchor_scale: float,
        box_stds: tuple[float, float, float, float],
        candidate_iou: float,
        topk: int,
        alpha: float,
        gamma: float,
        class_weight: float,
        giou_weight: float,
        iou_weight: float,
        selection: Selection,
    ) -> None:
        super().__init__()
        self.topk, self.class_loss = topk, Focal(alpha, gamma)
        self.candidate_iou = candidate_iou
        self.weights = {"class": class_weight, "giou": giou_weight, "iou": iou_weight}
        self.selection = selection
        self.grid, self.coder = AnchorGrid((anchor_scale,), (1.0,)), BoxCoder(box_stds)
        self.predictor = DensePredictor(width, num_classes, num_convs, num_groups, num_levels=num_levels, quality=True)

    def forward(self, pyramid: Pyramid, targets: Targets) -> HeadOutput:
        dense = self.predictor(pyramid)
        found = self.assign(dense, pyramid, targets)
        losses = self.losses(dense, found)
        return HeadOutput(weighted(losses, self.weights), found)

    def assign(self, dense: Dense, pyramid: Pyramid, targets: Targets) -> Positives:
        boxes = targets.boxes_xyxy
        every = self.grid.every(pyramid).expand(len(boxes), -1, -1)
        valid = self.grid.valid(pyramid, targets.frames.sizes)
        matched_index = assign_max_iou(every, valid, boxes, targets.valid, self.candidate_iou, self.candidate_iou, 0.0)
        labels, target_boxes = assigned_labels(targets.labels, matched_index), assigned_boxes(boxes, matched_index)
        cost = self._cost(dense, every, labels, target_boxes)
        matched_index = assign_paa(matched_index, cost, pyramid.cells, boxes.shape[1], self.topk)
        return assigned(every, flatten(pyramid.levels, 1), matched_index, targets)

    @torch.no_grad()
    def _cost(self, dense: Dense, anchors: Tensor, labels: Tensor, target_boxes: Tensor) -> Tensor:
        """[B, N] what it would cost to make each candidate (label >= 0) a positive."""
        focal = self.class_loss(dense.logits, labels, (labels >= 0).float()).sum(-1)
        giou = giou_loss(self.coder.decode(anchors, dense.boxes), target_boxes)
        return (self.weights["class"] * focal + self.weights["giou"] * giou).where(labels >= 0, 0)

    def losses(self, dense: Dense, found: Positives) -> dict[str, Tensor]:
        assert dense.quality is not None
        positive, target_boxes = found.positive, found.target_boxes_xyxy
        count = normaliser(positive.sum())
        boxes = self.coder.decode(found.boxes_xyxy, dense.boxes)
        quality = aligned_iou(boxes.detach(), target_boxes).where(positive, 0)
        focal = self.class_loss(dense.logits, found.labels, quality).sum(-1)
        giou = giou_loss(boxes, target_boxes).where(positive, 0)
        entropy = binary_cross_entropy_with_logits(dense.quality, quality, reduction="none")
        return {
            "class": focal.where(positive | found.negative, 0).sum() / count.clamp(min=len(positive)),
            "giou": (giou * quality).sum() / normaliser(quality.sum()).clamp(min=1e-6),
            "iou": entropy.where(positive, 0).sum() / count.clamp(min=1),
        }

    def detect(self, pyramid: Pyramid, sizes: Tensor) -> list[Detections]:
        """Boxes in network pixels, best first; the score is the geometric mean of class probability and IoU."""
        dense = self.predictor(pyramid)
        boxes = self.coder.decode(self.grid.every(pyramid), dense.boxes)
        assert dense.quality is not None
        return self.selection(dense.logits.sigmoid().sqrt(), dense.quality.sigmoid().sqrt(), boxes, pyramid, sizes)
