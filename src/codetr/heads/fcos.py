"""FCOS as auxiliary head (Tian et al. 2019; Co-DETR, table 1)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from codetr.assign.fcos import assign_fcos
from codetr.heads.common import assigned, cell_strides, flatten, weighted
from codetr.heads.dense import Dense, DensePredictor, Selection
from codetr.losses import Focal, giou_loss
from codetr.nn.anchors import AnchorGrid
from codetr.nn.boxes import around, center_size, centerness_target
from codetr.ops.normaliser import normaliser
from codetr.types import Detections, HeadOutput, Positives, Pyramid, Targets


class Points(NamedTuple):
    """The points of all levels, one per cell.

    boxes: [N, 4] xyxy around them.
    strides: [N].
    limits: [N, 2] see `assign_fcos`.
    """

    boxes: Tensor
    strides: Tensor
    limits: Tensor

    @property
    def centers(self) -> Tensor:
        return center_size(self.boxes)[0]


class FCOSHead(nn.Module):
    """One point per cell, in its middle; classes, distances to the four sides and centerness, shared by all levels but
    for a scale of the distances.

    Losses: focal loss; GIoU weighted by centerness; cross entropy of the centerness. Its positive coordinates are boxes
    of side `box_side` strides around the points (Co-DETR: 8 strides), with the pyramid's features there.

    center_radius: half side, in strides, of the square in the middle of an object in which its points must lie; None:
        anywhere in it.
    reach: greatest distance to the farthest side, in strides, for which a level is responsible; the next level goes on
        from there, the last one without limit.
    """

    def __init__(
        self,
        width: int,
        num_classes: int,
        num_levels: int,
        num_convs: int,
        num_groups: int,
        box_side: float,
        center_radius: float | None,
        reach: float,
        alpha: float,
        gamma: float,
        class_weight: float,
        giou_weight: float,
        centerness_weight: float,
        selection: Selection,
    ) -> None:
        super().__init__()
        self.class_loss = Focal(alpha, gamma)
        self.center_radius, self.reach = center_radius, reach
        self.weights = {"class": class_weight, "giou": giou_weight, "centerness": centerness_weight}
        self.selection = selection
        self.grid = AnchorGrid((box_side,), (1.0,), offset=0.5)
        self.predictor = DensePredictor(width, num_classes, num_convs, num_groups, num_levels=num_levels, quality=True)

    def points(self, pyramid: Pyramid) -> Points:
        boxes, strides = self.grid.every(pyramid), cell_strides(pyramid)
        far = (self.reach * strides).masked_fill(strides == pyramid.strides[-1], torch.inf)
        near = (self.reach * strides / 2).masked_fill(strides == pyramid.strides[0], -1)  # levels double
        return Points(boxes, strides, torch.stack([near, far], -1))

    def predict(self, pyramid: Pyramid) -> Dense:
        """The predictions, with boxes as pixels to the left, upper, right and lower side."""
        dense = self.predictor(pyramid)
        return dense._replace(boxes=dense.boxes.exp() * cell_strides(pyramid)[:, None])

    def assign(self, pyramid: Pyramid, targets: Targets) -> Positives:
        points, boxes = self.points(pyramid), targets.boxes_xyxy
        valid = self.grid.valid(pyramid, targets.frames.sizes)
        radius = None if self.center_radius is None else points.strides * self.center_radius
        matched_index = assign_fcos(points.centers, valid, radius, points.limits, boxes, targets.valid)
        return assigned(points.boxes.expand(len(boxes), -1, -1), flatten(pyramid.levels, 1), matched_index, targets)

    def forward(self, pyramid: Pyramid, targets: Targets) -> HeadOutput:
        found = self.assign(pyramid, targets)
        losses = self.losses(self.predict(pyramid), found)
        return HeadOutput(weighted(losses, self.weights), found)

    def losses(self, dense: Dense, found: Positives) -> dict[str, Tensor]:
        assert dense.quality is not None
        positive, target_boxes = found.positive, found.target_boxes_xyxy
        count = normaliser(positive.sum()).clamp(min=1)
        quality = centerness_target(found.boxes_xyxy, target_boxes).where(positive, 0)
        focal = self.class_loss(dense.logits, found.labels, quality).sum(-1)
        giou = giou_loss(around(found.boxes_xyxy, dense.boxes), target_boxes)
        entropy = binary_cross_entropy_with_logits(dense.quality, quality, reduction="none")
        return {
            "class": focal.where(positive | found.negative, 0).sum() / count,
            "giou": (giou.where(positive, 0) * quality).sum() / normaliser(quality.sum()).clamp(min=1e-6),
            "centerness": entropy.where(positive, 0).sum() / count,
        }

    def detect(self, pyramid: Pyramid, sizes: Tensor) -> list[Detections]:
        """Boxes in network pixels, best first; the score is class probability times centerness."""
        dense = self.predict(pyramid)
        boxes = around(self.points(pyramid).boxes, dense.boxes)
        assert dense.quality is not None
        return self.selection(dense.logits.sigmoid(), dense.quality.sigmoid(), boxes, pyramid, sizes)
