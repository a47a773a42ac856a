"""ATSS as auxiliary head (Zhang et al. 2020; Co-DETR, table 1)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

from codetr.assign import BACKGROUND
from codetr.assign.atss import assign_atss
from codetr.heads.common import (
    PRIOR,
    assigned_boxes,
    assigned_labels,
    detections,
    flatten,
    init_normal,
    take,
    top_per_level,
)
from codetr.nn.anchors import AnchorGrid, BoxCoder, clip
from codetr.ops.distributed import mean_over_processes
from codetr.ops.nms import best_after_nms
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
        candidates_per_level: int,
        nms_iou: float,
        max_detections: int,
    ) -> None:
        super().__init__()
        self.num_classes, self.topk, self.alpha, self.gamma = num_classes, topk, alpha, gamma
        self.weights = {"class": class_weight, "giou": giou_weight, "centerness": centerness_weight}
        self.candidates_per_level, self.nms_iou, self.max_detections = candidates_per_level, nms_iou, max_detections
        self.grid = AnchorGrid((anchor_scale,), (1.0,))
        self.coder = BoxCoder(box_stds)
        self.class_tower = _tower(width, num_convs, num_groups)
        self.box_tower = _tower(width, num_convs, num_groups)
        self.classes = nn.Conv2d(width, num_classes, 3, padding=1)
        self.deltas = nn.Conv2d(width, 4, 3, padding=1)
        self.centerness = nn.Conv2d(width, 1, 3, padding=1)
        self.scales = nn.Parameter(torch.ones(num_levels))
        init_normal(self, 0.01)
        assert self.classes.bias is not None
        nn.init.constant_(self.classes.bias, -math.log((1 - PRIOR) / PRIOR))

    def predict(self, pyramid: Pyramid) -> tuple[Tensor, Tensor, Tensor]:
        """Class logits [B, N, K], deltas [B, N, 4] and centerness logits [B, N], float32."""
        if len(pyramid.levels) != len(self.scales):
            raise ValueError(f"ATSSHead has num_levels={len(self.scales)}, the pyramid {len(pyramid.levels)}")
        logits, deltas, centerness = [], [], []
        for level, scale in zip(pyramid.levels, self.scales, strict=True):
            boxes = self.box_tower(level)
            logits.append(self.classes(self.class_tower(level)))
            deltas.append(self.deltas(boxes) * scale)
            centerness.append(self.centerness(boxes))
        return flatten(logits, 1).float(), flatten(deltas, 1).float(), flatten(centerness, 1).float()[..., 0]

    def assign(self, pyramid: Pyramid, targets: Targets) -> Positives:
        anchors = self.grid(pyramid)
        boxes = targets.boxes_xyxy
        valid = self.grid.valid(pyramid, targets.sizes)
        owner = assign_atss(anchors, valid, boxes, targets.valid, self.topk)
        return Positives(
            boxes_xyxy=torch.cat(anchors).expand(len(boxes), -1, -1),
            features=flatten(pyramid.levels, 1),
            labels=assigned_labels(targets.labels, owner),
            target_boxes_xyxy=assigned_boxes(boxes, owner),
            positive=owner >= 0,
            negative=owner == BACKGROUND,
        )

    def forward(self, pyramid: Pyramid, targets: Targets) -> HeadOutput:
        assigned = self.assign(pyramid, targets)
        losses = self.losses(*self.predict(pyramid), assigned)
        return HeadOutput({term: value * self.weights[term] for term, value in losses.items()}, assigned)

    def losses(self, logits: Tensor, deltas: Tensor, centerness: Tensor, assigned: Positives) -> dict[str, Tensor]:
        positive, goals = assigned.positive, assigned.target_boxes_xyxy
        count = mean_over_processes(positive.sum(1).clamp(min=1).sum())
        quality = centerness_target(assigned.boxes_xyxy, goals).where(positive, 0)
        labels = assigned.labels.clamp(min=0)[..., None]
        classes = torch.zeros_like(logits).scatter_(-1, labels, positive.to(logits)[..., None])
        focal = sigmoid_focal_loss(logits, classes, self.alpha, self.gamma).sum(-1)
        giou = generalized_box_iou_loss(self.coder.decode(assigned.boxes_xyxy, deltas), goals)
        entropy = binary_cross_entropy_with_logits(centerness, quality, reduction="none")
        return {
            "class": focal.where(positive | assigned.negative, 0).sum() / count,
            "giou": (giou * quality).sum() / mean_over_processes(quality.sum()).clamp(min=1),
            "centerness": entropy.where(positive, 0).sum() / count,
        }

    @torch.no_grad()
    def detect(self, pyramid: Pyramid, sizes: Tensor) -> list[Detections]:
        """Boxes in network pixels, best first; the score is class probability times centerness."""
        logits, deltas, centerness = self.predict(pyramid)
        anchors = self.grid(pyramid)
        probability = logits.sigmoid().flatten(1)
        sizes_per_level = [len(level) * self.num_classes for level in anchors]
        best, _ = top_per_level(probability, sizes_per_level, self.candidates_per_level)
        cell, labels = best // self.num_classes, best % self.num_classes
        scores = probability.gather(1, best) * centerness.sigmoid().gather(1, cell)
        boxes = clip(self.coder.decode(torch.cat(anchors)[cell], take(deltas, cell)), sizes)
        valid = (boxes[..., 2:] > boxes[..., :2]).all(-1)
        keep, kept = best_after_nms(boxes, scores, labels, valid, self.nms_iou, self.max_detections)
        return detections(scores.gather(1, keep), labels.gather(1, keep), take(boxes, keep), kept)


def centerness_target(anchors: Tensor, boxes: Tensor) -> Tensor:
    """FCOS, eq. 3, of the anchors' centres in the boxes: [..., 4], [..., 4] xyxy -> [...]; 0 for centres outside."""
    center = (anchors[..., :2] + anchors[..., 2:]) / 2
    low, high = center - boxes[..., :2], boxes[..., 2:] - center
    ratio = torch.minimum(low, high).clamp(min=0) / torch.maximum(low, high).clamp(min=1e-6)
    return ratio.prod(-1).sqrt()


def _tower(width: int, num_convs: int, num_groups: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(num_convs):
        layers += [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.GroupNorm(num_groups, width), nn.ReLU(True)]
    return nn.Sequential(*layers)
