"""Adaptive training sample selection (ATSS, Zhang et al. 2020, algorithm 1)."""

import torch
from torch import Tensor
from torchvision.ops import box_iou

from codetr.assign import BACKGROUND, IGNORED
from codetr.nn.boxes import center_size, point_distances
from codetr.ops.gather import smallest


def assign_atss(anchors: list[Tensor], anchor_valid: Tensor, boxes: Tensor, valid: Tensor, topk: int) -> Tensor:
    """For each object, choose among the `topk` anchors of each level that are nearest to its centre those with an IoU
    of at least mean + standard deviation of the IoUs of them all, and whose centre lies in the object.

    Of several objects an anchor takes the one of highest IoU, the first one of equals.

    anchors: per level [N_j, 4], shared by all images.
    anchor_valid: [B, N]; the others are ignored.
    boxes: [B, M, 4], M >= 1.
    valid: [B, M].

    All boxes xyxy in pixels. Returns [B, N]: object index, BACKGROUND or IGNORED.
    """
    every = torch.cat(anchors)
    centers, _ = center_size(every)
    nearest = _nearest(centers, [len(level) for level in anchors], anchor_valid, boxes, topk)
    usable = anchor_valid[:, None].expand(-1, boxes.shape[1], -1).gather(2, nearest) & valid[:, :, None]
    iou = box_iou(boxes[:, :, None], every[nearest])[:, :, 0]
    chosen = usable & (iou >= _threshold(iou, usable)) & _inside(centers[nearest], boxes)
    quality = iou.new_full((*boxes.shape[:2], len(every)), -1).scatter_(2, nearest, iou.masked_fill(~chosen, -1))
    best, matched_index = quality.max(1)
    return matched_index.masked_fill(best < 0, BACKGROUND).masked_fill(~anchor_valid, IGNORED)


def _nearest(centers: Tensor, sizes: list[int], anchor_valid: Tensor, boxes: Tensor, topk: int) -> Tensor:
    """Indices [B, M, topk per level] of the valid anchors nearest to each object's centre, of equals the first ones."""
    objects, _ = center_size(boxes)
    offset = centers[None, None] - objects[:, :, None]
    distance = offset.square().sum(-1).sqrt().masked_fill(~anchor_valid[:, None], torch.inf)
    parts, start = [], 0
    for level in distance.split(sizes, 2):
        parts.append(smallest(level.float(), topk) + start)
        start += level.shape[2]
    return torch.cat(parts, 2)


def _threshold(iou: Tensor, usable: Tensor) -> Tensor:
    """[B, M, 1] mean plus (unbiased) standard deviation over the usable candidates."""
    count = usable.sum(2, keepdim=True).clamp(min=1)
    mean = iou.where(usable, 0).sum(2, keepdim=True) / count
    variance = (iou - mean).square().where(usable, 0).sum(2, keepdim=True) / (count - 1).clamp(min=1)
    return mean + variance.sqrt()


def _inside(centers: Tensor, boxes: Tensor) -> Tensor:
    """[B, M, K, 2] points, [B, M, 4] boxes -> [B, M, K]: more than 0.01 pixels from every side."""
    return point_distances(centers, boxes[:, :, None]).amin(-1) > 0.01
