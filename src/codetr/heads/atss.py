"""ATSS as auxiliary head (Zhang et al. 2020; Co-DETR, table 1)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from codetr.heads.common import assigned_by_atss, weighted
from codetr.heads.dense import Dense, DensePredictor, Selection
from codetr.losses import Focal, giou_loss
from codetr.nn.anchors import AnchorGrid
from codetr.nn.boxes import BoxCoder, centerness_target
from codetr.ops.normaliser import normaliser
from codetr.types import Detections, HeadOutput, Positives, Pyramid, Targets


class ATSSHead(nn.Module):
    """One anchor per cell; classes, box deltas and centerness, shared by all levels but for a scale of the deltas.

    Losses: focal loss, GIoU weighted by the centerness of the anchor in its object, cross entropy of the
    centerness. Its positive coordinates are the anchors, with the pyramid's features at their cells.
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
        topk: int,
        alpha: float,
        gamma: float,
        class_weight: float,
        giou_weight: float,
        centerness_weight: float,
        selection: Selection,
    ) -> None:
        super().__init__()
        self.topk, self.class_loss = topk, Focal(alpha, gamma)
        self.weights = {"class": class_weight, "giou": giou_weight, "centerness": centerness_weight}
        self.selection = selection
        self.grid = AnchorGrid((anchor_scale,), (1.0,))
        self.coder = BoxCoder(box_stds)
        self.predictor = DensePredictor(width, num_classes, num_convs, num_groups, num_levels=num_levels, quality=True)

    def assign(self, pyramid: Pyramid, targets: Targets) -> Positives:
        return assigned_by_atss(self.grid, pyramid, targets, self.topk)

    def forward(self, pyramid: Pyramid, targets: Targets) -> HeadOutput:
        found = self.assign(pyramid, targets)
        losses = self.losses(self.predictor(pyramid), found)
        return HeadOutput(weighted(losses, self.weights), found)

    def losses(self, dense: Dense, found: Positives) -> dict[str, Tensor]:
        assert dense.quality is not None
        positive, target_boxes = found.positive, found.target_boxes_xyxy
        count = normaliser(positive.sum(1).clamp(min=1).sum())
        quality = centerness_target(found.boxes_xyxy, target_boxes).where(positive, 0)
        focal = self.class_loss(dense.logits, found.labels, quality).sum(-1)
        giou = giou_loss(self.coder.decode(found.boxes_xyxy, dense.boxes), target_boxes)
        entropy = binary_cross_entropy_with_logits(dense.quality, quality, reduction="none")
        return {
            "class": focal.where(positive | found.negative, 0).sum() / count,
            "giou": (giou * quality).sum() / normaliser(quality.sum()).clamp(min=1),
            "centerness": entropy.where(positive, 0).sum() / count,
        }

    def detect(self, pyramid: Pyramid, sizes: Tensor) -> list[Detections]:
        """Boxes in network pixels, best first; the score is class probability times centerness."""
        dense = self.predictor(pyramid)
        boxes = self.coder.decode(self.grid.every(pyramid), dense.boxes)
        assert dense.quality is not None
        return self.selection(dense.logits.sigmoid(), dense.quality.sigmoid(), boxes, pyramid, sizes)
