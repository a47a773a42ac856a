"""RetinaNet as auxiliary head (Lin et al. 2017; Co-DETR, table 1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from codetr.assign.max_iou import assign_max_iou
from codetr.heads.common import assigned, flatten, weighted
from codetr.heads.dense import Dense, DensePredictor, Selection
from codetr.losses import Focal, giou_loss
from codetr.nn.anchors import AnchorGrid
from codetr.nn.boxes import BoxCoder
from codetr.ops.normaliser import normaliser
from codetr.types import Detections, HeadOutput, Positives, Pyramid, Targets


class RetinaNetHead(nn.Module):
    """Several anchors per cell, assigned by thresholds on the IoU; classes and box deltas, shared by all levels.

    Losses: focal loss; on the boxes `giou` (Co-DETR) or `l1` of the deltas (the original). Its positive coordinates
    are the anchors, with the pyramid's features at their cells.
    """

    def __init__(
        self,
        width: int,
        num_classes: int,
        num_convs: int,
        num_groups: int,
        anchor_scales: Sequence[float],
        anchor_ratios: Sequence[float],
        box_stds: tuple[float, float, float, float],
        positive_iou: float,
        negative_iou: float,
        alpha: float,
        gamma: float,
        box_loss: Literal["giou", "l1"],
        class_weight: float,
        box_weight: float,
        selection: Selection,
    ) -> None:
        super().__init__()
        self.class_loss = Focal(alpha, gamma)
        self.positive_iou, self.negative_iou, self.box_loss = positive_iou, negative_iou, box_loss
        self.weights = {"class": class_weight, box_loss: box_weight}
        self.selection = selection
        self.grid, self.coder = AnchorGrid(anchor_scales, anchor_ratios), BoxCoder(box_stds)
        self.predictor = DensePredictor(width, num_classes, num_convs, num_groups, per_cell=self.grid.per_cell)

    def assign(self, pyramid: Pyramid, targets: Targets) -> Positives:
        anchors = self.grid.every(pyramid)
        boxes = targets.boxes_xyxy
        valid = self.grid.valid(pyramid, targets.frames.sizes)
        matched_index = assign_max_iou(anchors, valid, boxes, targets.valid, self.positive_iou, self.negative_iou, 0.0)
        features = flatten(pyramid.levels, 1).repeat_interleave(self.grid.per_cell, 1)
        return assigned(anchors.expand(len(boxes), -1, -1), features, matched_index, targets)

    def forward(self, pyramid: Pyramid, targets: Targets) -> HeadOutput:
        found = self.assign(pyramid, targets)
        losses = self.losses(self.predictor(pyramid), found)
        return HeadOutput(weighted(losses, self.weights), found)

    def losses(self, dense: Dense, found: Positives) -> dict[str, Tensor]:
        positive = found.positive
        count = normaliser(positive.sum(1).clamp(min=1).sum())
        focal = self.class_loss(dense.logits, found.labels, positive.float()).sum(-1)
        if self.box_loss == "giou":
            boxes = self.coder.decode(found.boxes_xyxy, dense.boxes)
            error = giou_loss(boxes, found.target_boxes_xyxy)
        else:
            error = (dense.boxes - self.coder.encode(found.boxes_xyxy, found.target_boxes_xyxy)).abs().sum(-1)
        return {
            "class": focal.where(positive | found.negative, 0).sum() / count,
            self.box_loss: error.where(positive, 0).sum() / count,
        }

    def detect(self, pyramid: Pyramid, sizes: Tensor) -> list[Detections]:
        """Boxes in network pixels, best first."""
        dense = self.predictor(pyramid)
        boxes = self.coder.decode(self.grid.every(pyramid), dense.boxes)
        return self.selection(dense.logits.sigmoid(), None, boxes, pyramid, sizes)
