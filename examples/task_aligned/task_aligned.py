"""An auxiliary head that codetr does not have: anchor-free, with task-aligned assignment (TOOD, Feng et al. 2021)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torchvision.ops import box_iou, generalized_box_iou_loss

from codetr.assign import BACKGROUND, IGNORED
from codetr.heads.common import assigned, cell_strides, flatten, weighted
from codetr.heads.dense import DensePredictor, Selection
from codetr.nn.anchors import AnchorGrid
from codetr.nn.boxes import around, center_size, point_distances
from codetr.ops.normaliser import normaliser
from codetr.types import Detections, HeadOutput, Positives, Pyramid, Targets


class TaskAlignedHead(nn.Module):
    """One point per cell; the points that are best at class and box together become an object's positives.

    Alignment of a point with an object: t = p^alpha * IoU^beta, of its predicted class and box. Positive are the `topk`
    points in the object with the highest t; a point with several objects takes the one of highest IoU. Losses: cross
    entropy with t, scaled per object to its best IoU, as target; GIoU weighted by the same.
    """

    def __init__(
        self,
        width: int,
        num_classes: int,
        num_convs: int,
        num_groups: int,
        box_side: float,
        topk: int,
        alpha: float,
        beta: float,
        class_weight: float,
        giou_weight: float,
        selection: Selection,
    ) -> None:
        super().__init__()
        self.topk, self.alpha, self.beta = topk, alpha, beta
        self.weights = {"class": class_weight, "giou": giou_weight}
        self.selection = selection
        self.grid = AnchorGrid((box_side,), (1.0,), offset=0.5)
        self.predictor = DensePredictor(width, num_classes, num_convs, num_groups)

    def predict(self, pyramid: Pyramid) -> tuple[Tensor, Tensor]:
        """Class logits [B, N, K] and boxes [B, N, 4] xyxy in pixels, float32."""
        dense = self.predictor(pyramid)
        distances = dense.boxes.exp() * cell_strides(pyramid)[:, None]
        return dense.logits, around(torch.cat(self.grid(pyramid)), distances)

    def forward(self, pyramid: Pyramid, targets: Targets) -> HeadOutput:
        logits, boxes = self.predict(pyramid)
        points = torch.cat(self.grid(pyramid))
        matched_index, quality = self.assign(
            points, self.grid.valid(pyramid, targets.frames.sizes), logits, boxes, targets
        )
        features = flatten(pyramid.levels, 1)
        positives = assigned(points.expand(len(boxes), -1, -1), features, matched_index, targets)
        losses = self.losses(logits, boxes, quality, positives)
        return HeadOutput(weighted(losses, self.weights), positives)

    @torch.no_grad()
    def assign(
        self, points: Tensor, valid: Tensor, logits: Tensor, boxes: Tensor, targets: Targets
    ) -> tuple[Tensor, Tensor]:
        """points: [N, 4] boxes around the points. valid: [B, N]. Returns the matched index [B, N] (of an object,
        BACKGROUND or IGNORED) and the quality [B, N], 0 where nothing is matched."""
        objects = targets.boxes_xyxy
        centers, _ = center_size(points)
        inside = point_distances(centers[None, None], objects[:, :, None]).amin(-1) > 0  # [B, M, N]
        usable = inside & valid[:, None] & targets.valid[:, :, None]
        iou = box_iou(objects, boxes)
        scores = logits.sigmoid().transpose(1, 2)
        scores = scores.gather(1, targets.labels[..., None].expand(-1, -1, scores.shape[-1]))
        alignment = (scores**self.alpha * iou**self.beta).where(usable, -1)
        best = alignment.topk(min(self.topk, alignment.shape[2]), dim=2).indices
        chosen = torch.zeros_like(usable).scatter_(2, best, True) & usable
        overlap, matched_index = iou.where(chosen, -1).max(1)
        matched_index = matched_index.masked_fill(overlap < 0, BACKGROUND).masked_fill(~valid, IGNORED)
        mine = chosen & (matched_index[:, None] == torch.arange(objects.shape[1], device=matched_index.device)[:, None])
        alignment, iou = alignment.where(mine, 0), iou.where(mine, 0)
        scaled = alignment / alignment.amax(2, keepdim=True).clamp(min=1e-9) * iou.amax(2, keepdim=True)
        return matched_index, scaled.amax(1)

    def losses(self, logits: Tensor, boxes: Tensor, quality: Tensor, found: Positives) -> dict[str, Tensor]:
        total = normaliser(quality.sum()).clamp(min=1)
        target = torch.zeros_like(logits).scatter_(-1, found.labels.clamp(min=0)[..., None], quality[..., None])
        weight = (target - logits.sigmoid()).abs().square().detach() + target  # hard negatives count most
        entropy = (binary_cross_entropy_with_logits(logits, target, reduction="none") * weight).sum(-1)
        giou = generalized_box_iou_loss(boxes, found.target_boxes_xyxy)
        return {
            "class": entropy.where(found.positive | found.negative, 0).sum() / total,
            "giou": (giou.where(found.positive, 0) * quality).sum() / total,
        }

    def detect(self, pyramid: Pyramid, sizes: Tensor) -> list[Detections]:
        """Boxes in network pixels, best first."""
        logits, boxes = self.predict(pyramid)
        return self.selection(logits.sigmoid(), None, boxes, pyramid, sizes)
