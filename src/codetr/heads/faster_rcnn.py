"""Faster R-CNN and, with a mask branch, Mask R-CNN as auxiliary head (Ren et al. 2015; Co-DETR, table 1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from codetr.assign import IGNORED
from codetr.heads.common import assigned, detections, weighted
from codetr.heads.mask import MaskBranch
from codetr.heads.regions import Regions, sample_regions
from codetr.heads.roi import BoxHead, RoIPool
from codetr.heads.rpn import RPN, ProposalSelection
from codetr.losses import giou_loss
from codetr.nn.boxes import BoxCoder, clip
from codetr.ops.gather import take
from codetr.ops.nms import best_after_nms
from codetr.ops.normaliser import normaliser
from codetr.types import Detections, HeadOutput, Positives, Pyramid, Targets


class FasterRCNNHead(nn.Module):
    """RPN, RoIAlign, and a classifier of regions with class-specific boxes.

    Losses: those of the RPN; cross entropy over K classes and background; GIoU of the decoded boxes. Its positive
    coordinates are the sampled regions, with their pooled features' mean.

    proposals: the RPN's boxes in training and in `detect`.
    positive_iou: below it a proposal is background.
    num_samples: regions per image in the loss, at most `positive_fraction` of them positive.
    score_threshold, nms_iou, max_detections: of `detect`.
    mask: makes it Mask R-CNN, whose positive regions also learn their object's mask.
    """

    def __init__(
        self,
        rpn: RPN,
        proposals: ProposalSelection,
        pool: RoIPool,
        box_head: BoxHead,
        box_stds: tuple[float, float, float, float],
        positive_iou: float,
        num_samples: int,
        positive_fraction: float,
        class_weight: float,
        giou_weight: float,
        score_threshold: float,
        nms_iou: float,
        max_detections: int,
        mask: MaskBranch | None = None,
    ) -> None:
        super().__init__()
        self.rpn, self.proposals, self.pool, self.box_head = rpn, proposals, pool, box_head
        self.mask = mask
        self.coder = BoxCoder(box_stds)
        self.positive_iou = positive_iou
        self.num_samples, self.most_positive = num_samples, int(num_samples * positive_fraction)
        self.weights = {"class": class_weight, "giou": giou_weight}
        self.score_threshold, self.nms_iou, self.max_detections = score_threshold, nms_iou, max_detections

    def forward(self, pyramid: Pyramid, targets: Targets) -> HeadOutput:
        logits, deltas = self.rpn(pyramid)
        losses = {f"rpn_{k}": v for k, v in self.rpn.losses(logits, deltas, pyramid, targets).items()}
        proposals, valid = self.rpn.propose(logits, deltas, pyramid, targets.frames.sizes, self.proposals)
        regions = self.sample(proposals, valid, targets)
        pooled = self.pool(pyramid, regions.boxes, regions.matched_index != IGNORED)
        positives = assigned(regions.boxes, pooled.mean((-2, -1)), regions.matched_index, targets)
        logits, deltas = self.box_head(pooled)
        losses |= weighted(self.losses(logits, deltas, positives), self.weights)
        if self.mask is not None:
            losses["mask"] = self.mask.loss(pyramid, regions.boxes, regions.matched_index, targets)
        return HeadOutput(losses, positives)

    def sample(self, proposals: Tensor, valid: Tensor, targets: Targets) -> Regions:
        """The objects themselves and the proposals [B, P, 4], assigned, then sampled to a fixed number."""
        return sample_regions(proposals, valid, targets, self.positive_iou, self.most_positive, self.num_samples)

    def losses(self, logits: Tensor, deltas: Tensor, regions: Positives) -> dict[str, Tensor]:
        valid = regions.positive | regions.negative
        count = normaliser(valid.sum()).clamp(min=1)
        background = logits.shape[-1] - 1
        labels = regions.labels.where(regions.positive, background)
        entropy = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
        own = regions.labels.clamp(min=0, max=deltas.shape[2] - 1)[..., None, None].expand(-1, -1, 1, 4)
        boxes = self.coder.decode(regions.boxes_xyxy, deltas.gather(2, own)[:, :, 0])
        giou = giou_loss(boxes, regions.target_boxes_xyxy)
        return {
            "class": entropy.where(valid, 0).sum() / count,
            "giou": giou.where(regions.positive, 0).sum() / count,
        }

    def detect(self, pyramid: Pyramid, sizes: Tensor) -> list[Detections]:
        """Boxes in network pixels, best first; a region may appear with several classes."""
        logits, deltas = self.rpn(pyramid)
        proposals, valid = self.rpn.propose(logits, deltas, pyramid, sizes, self.proposals)
        logits, deltas = self.box_head(self.pool(pyramid, proposals, valid))
        scores = logits.softmax(-1)[..., :-1]
        deltas = deltas.expand(*scores.shape, 4)
        boxes = clip(self.coder.decode(proposals[:, :, None], deltas).flatten(1, 2), sizes)
        labels = torch.arange(scores.shape[-1], device=scores.device).expand_as(scores).flatten(1)
        candidates = (valid[..., None] & (scores > self.score_threshold)).flatten(1)
        scores = scores.flatten(1)
        keep, kept = best_after_nms(boxes, scores, labels, candidates, self.nms_iou, self.max_detections)
        return detections(scores.gather(1, keep), labels.gather(1, keep), take(boxes, keep), kept)
