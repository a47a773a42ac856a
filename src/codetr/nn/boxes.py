"""Box arithmetic that torchvision lacks: references, deltas, distances to sides, IoU of pairs, the best predictions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert

from codetr.ops.gather import take
from codetr.types import Prediction, box_scale

MAX_LOG_SCALE = abs(math.log(16 / 1000))  # no decoded side is more than 62.5 times its anchor's


def inverse_sigmoid(x: Tensor, eps: float) -> Tensor:
    """Logit of `x` clamped to [0, 1], with both arguments of the logarithm at least `eps`."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


def refine(reference: Tensor, delta: Tensor, eps: float) -> Tensor:
    """Iterative box refinement (Deformable DETR, appendix A.4): add `delta` in logit space.

    reference: [..., 2 or 4] after the sigmoid; a 2-d reference shifts only the centre.
    delta: [..., 4].
    """
    shift = inverse_sigmoid(reference, eps)
    if reference.shape[-1] == 2:
        shift = torch.cat([shift, torch.zeros_like(shift)], -1)
    return (delta + shift).sigmoid()


def aligned_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU of corresponding xyxy boxes: [..., 4], [..., 4] -> [...]."""
    overlap = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - overlap
    return overlap / union.clamp(min=1e-6)


def center_size(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """[..., 4] xyxy -> centres (x, y) and sizes (width, height), [..., 2] each."""
    low, high = boxes.split(2, -1)
    return (low + high) / 2, high - low


def clip(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Clip xyxy boxes [B, N, 4] to their images. sizes: [B, 2] (height, width)."""
    return boxes.clamp(min=0).minimum(box_scale(sizes).to(boxes)[:, None])


def around(boxes: Tensor, distances: Tensor) -> Tensor:
    """Boxes at these distances (left, top, right, bottom) from the centres of `boxes`: [..., 4] xyxy."""
    center, _ = center_size(boxes)
    return torch.cat([center - distances[..., :2], center + distances[..., 2:]], -1)


def point_distances(points: Tensor, boxes: Tensor) -> Tensor:
    """[..., 2], [..., 4] xyxy -> [..., 4] distances to the left, upper, right and lower side; negative outside."""
    return torch.cat([points - boxes[..., :2], boxes[..., 2:] - points], -1)


def centerness_target(anchors: Tensor, boxes: Tensor) -> Tensor:
    """FCOS, eq. 3, of the anchors' centres in the boxes: [..., 4], [..., 4] xyxy -> [...]; 0 for centres outside."""
    low, high = point_distances(center_size(anchors)[0], boxes).split(2, -1)
    ratio = torch.minimum(low, high).clamp(min=0) / torch.maximum(low, high).clamp(min=1e-6)
    return ratio.prod(-1).sqrt()


def tight_boxes(masks: Tensor) -> Tensor:
    """[n, H, W] of 0 and 1 -> xyxy boxes of the ones [n, 4]; zero where there are none."""
    lows, highs = [], []
    for seen in (masks.amax(1), masks.amax(2)):  # columns, rows
        index = torch.arange(seen.shape[1], device=masks.device)
        lows.append(index.where(seen > 0, seen.shape[1]).amin(1))
        highs.append((index + 1).where(seen > 0, 0).amax(1))
    return torch.stack([*lows, *highs], 1).where(highs[0][:, None] > 0, 0).float()


def best_pairs(prediction: Prediction, sizes: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `count` best (query, class) pairs of each image, best first; a query may appear with several classes.

    prediction: one layer, [B, N, ...].
    sizes: [B, 2] (height, width) in pixels.

    Returns scores [B, n], labels [B, n] and boxes [B, n, 4] xyxy in these pixels, cut off at the image.
    """
    num_classes = prediction.logits.shape[-1]
    scores = prediction.logits.float().sigmoid().flatten(1)
    scores, index = scores.topk(min(count, scores.shape[1]), dim=1)
    boxes = box_convert(take(prediction.boxes.float(), index // num_classes), "cxcywh", "xyxy")
    return scores, index % num_classes, clip(boxes * box_scale(sizes).to(boxes)[:, None], sizes)


class BoxCoder(nn.Module):
    """Deltas (dx, dy, dw, dh) of boxes relative to anchors, divided by `stds`; boxes are xyxy in pixels."""

    stds: Tensor

    def __init__(self, stds: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("stds", torch.tensor(tuple(stds)), persistent=False)

    def encode(self, anchors: Tensor, boxes: Tensor) -> Tensor:
        """[..., 4], [..., 4] -> [..., 4]."""
        (anchor_center, anchor_size), (center, size) = center_size(anchors), center_size(boxes)
        deltas = torch.cat([(center - anchor_center) / anchor_size, (size / anchor_size).log()], -1)
        return deltas / self.stds

    def decode(self, anchors: Tensor, deltas: Tensor) -> Tensor:
        """[..., 4], [..., 4] -> [..., 4], not clipped to the image."""
        shift, log_scale = (deltas * self.stds).split(2, -1)
        anchor_center, anchor_size = center_size(anchors)
        center = anchor_center + shift * anchor_size
        half = anchor_size * log_scale.clamp(-MAX_LOG_SCALE, MAX_LOG_SCALE).exp() / 2
        return torch.cat([center - half, center + half], -1)
