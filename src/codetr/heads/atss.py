"""ATSS as auxiliary head (Zhang et al. 2020; Co-DETR, table 1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from codetr.assign.atss import assign_atss
from codetr.heads.common import assigned, centerness_target, flatten, init_normal
from codetr.heads.dense import Selection, start_at_prior, tower
from codetr.losses import Focal, giou_loss
from codetr.nn.anchors import AnchorGrid, BoxCoder
from codetr.ops.distributed import mean_over_processes
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
        self.class_tower, self.box_tower = (tower(width, num_convs, num_groups) for _ in range(2))
        self.classes = nn.Conv2d(width, num_classes, 3, padding=1)
        self.deltas = nn.Conv2d(width, 4, 3, padding=1)
        self.centerness = nn.Conv2d(width, 1, 3, padding=1)
        self.scales = nn.Parameter(torch.ones(num_levels))
        init_normal(self, 0.01)
        start_at_prior(self.classes)

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
        return assigned(torch.cat(anchors).expand(len(boxes), -1, -1), flatten(pyramid.levels, 1), owner, targets)

    def forward(self, pyramid: Pyramid, targets: Targets) -> HeadOutput:
        found = self.assign(pyramid, targets)
        losses = self.losses(*self.predict(pyramid), found)
        return HeadOutput({term: value * self.weights[term] for term, value in losses.items()}, found)

    def losses(self, logits: Tensor, deltas: Tensor, centerness: Tensor, found: Positives) -> dict[str, Tensor]:
        positive, goals = found.positive, found.target_boxes_xyxy
        count = mean_over_processes(positive.sum(1).clamp(min=1).sum())
        quality = centerness_target(found.boxes_xyxy, goals).where(positive, 0)
        focal = self.class_loss(logits, found.labels, quality).sum(-1)
        giou = giou_loss(self.coder.decode(found.boxes_xyxy, deltas), goals)
        entropy = binary_cross_entropy_with_logits(centerness, quality, reduction="none")
        return {
            "class": focal.where(positive | found.negative, 0).sum() / count,
            "giou": (giou * quality).sum() / mean_over_processes(quality.sum()).clamp(min=1),
            "centerness": entropy.where(positive, 0).sum() / count,
        }

    @torch.no_grad()
    def detect(self, pyramid: Pyramid, sizes: Tensor) -> list[Detections]:
        """Boxes in network pixels, best first; the score is class probability times centerness."""
        logits, deltas, centerness = self.predict(pyramid)
        anchors = self.grid(pyramid)
        boxes = self.coder.decode(torch.cat(anchors).expand(len(deltas), -1, -1), deltas)
        return self.selection(logits.sigmoid(), centerness.sigmoid(), boxes, [len(a) for a in anchors], sizes)
