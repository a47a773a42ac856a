"""GFL as auxiliary head (Generalized Focal Loss, Li et al. 2020)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from codetr.heads.common import assigned_by_atss, cell_strides, weighted
from codetr.heads.dense import DensePredictor, Selection
from codetr.losses import QualityFocal, giou_loss
from codetr.nn.anchors import AnchorGrid
from codetr.nn.boxes import aligned_iou, around, center_size, point_distances
from codetr.ops.normaliser import normaliser
from codetr.types import Detections, HeadOutput, Positives, Pyramid, Targets


class GFLHead(nn.Module):
    """One anchor per cell, assigned by ATSS; class scores that are IoUs, and distributions over the distances to the
    four sides, shared by all levels but for a scale of the distances.

    Losses: quality focal loss; GIoU and distribution focal loss, weighted by the best class score. Its positive
    coordinates are the anchors, with the pyramid's features at their cells. num_bins: a distance is the mean of a
    distribution over 0, 1, ..., num_bins - 1 strides.
    """

    bins: Tensor

    def __init__(
        self,
        width: int,
        num_classes: int,
        num_levels: int,
        num_convs: int,
        num_groups: int,
        anchor_scale: float,
        topk: int,
        num_bins: int,
        beta: float,
        class_weight: float,
        giou_weight: float,
        distribution_weight: float,
        selection: Selection,
    ) -> None:
        super().__init__()
        self.topk, self.class_loss = topk, QualityFocal(beta)
        self.weights = {"class": class_weight, "giou": giou_weight, "distribution": distribution_weight}
        self.selection = selection
        self.grid = AnchorGrid((anchor_scale,), (1.0,))
        self.predictor = DensePredictor(
            width, num_classes, num_convs, num_groups, box_values=4 * num_bins, num_levels=num_levels
        )
        self.register_buffer("bins", torch.arange(float(num_bins)), persistent=False)

    def predict(self, pyramid: Pyramid) -> tuple[Tensor, Tensor]:
        """Class logits [B, N, K], logits of the distances [B, N, 4, bins] (left, top, right, bottom), float32."""
        dense = self.predictor(pyramid)
        return dense.logits, dense.boxes.unflatten(-1, (4, len(self.bins)))

    def assign(self, pyramid: Pyramid, targets: Targets) -> Positives:
        return assigned_by_atss(self.grid, pyramid, targets, self.topk)

    def forward(self, pyramid: Pyramid, targets: Targets) -> HeadOutput:
        found = self.assign(pyramid, targets)
        losses = self.losses(*self.predict(pyramid), cell_strides(pyramid), found)
        return HeadOutput(weighted(losses, self.weights), found)

    def losses(self, logits: Tensor, distances: Tensor, strides: Tensor, found: Positives) -> dict[str, Tensor]:
        """strides: [N] of every candidate."""
        positive = found.positive
        anchors, target_boxes = (boxes / strides[:, None] for boxes in (found.boxes_xyxy, found.target_boxes_xyxy))
        boxes = around(anchors, self.mean(distances))
        quality = aligned_iou(boxes.detach(), target_boxes)
        classes = self.class_loss(logits, found.labels, quality).sum(-1)
        count = normaliser(positive.sum(1).clamp(min=1).sum())
        weight = logits.detach().sigmoid().amax(-1).where(positive, 0)
        total = normaliser(weight.sum()).clamp(min=1)
        giou = giou_loss(boxes, target_boxes)
        centers, _ = center_size(anchors)
        spread = distribution_focal_loss(distances, point_distances(centers, target_boxes)).mean(-1)
        return {
            "class": classes.where(positive | found.negative, 0).sum() / count,
            "giou": (giou.where(positive, 0) * weight).sum() / total,
            "distribution": (spread.where(positive, 0) * weight).sum() / total,
        }

    def mean(self, distances: Tensor) -> Tensor:
        """[..., 4, bins] logits -> [..., 4] expected distances in strides."""
        return (distances.softmax(-1) * self.bins).sum(-1)

    def detect(self, pyramid: Pyramid, sizes: Tensor) -> list[Detections]:
        """Boxes in network pixels, best first."""
        logits, distances = self.predict(pyramid)
        boxes = around(self.grid.every(pyramid), self.mean(distances) * cell_strides(pyramid)[:, None])
        return self.selection(logits.sigmoid(), None, boxes, pyramid, sizes)


def distribution_focal_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross entropy with the two bins beside the target, weighted by nearness (GFL, eq. 6).

    logits: [..., bins].
    target: [...], clipped to 0 and just below the last bin.

    Returns [...].
    """
    target = target.clamp(0, logits.shape[-1] - 1 - 0.1)
    left = target.floor()
    flat = logits.flatten(0, -2)

    def entropy(bins: Tensor) -> Tensor:
        return cross_entropy(flat, bins.long().flatten(), reduction="none").view_as(target)

    return entropy(left) * (left + 1 - target) + entropy(left + 1) * (target - left)
