"""Non-maximum suppression for a whole batch at once."""

import torch
from torch import Tensor
from torchvision.ops import batched_nms


def best_after_nms(
    boxes: Tensor, scores: Tensor, groups: Tensor, valid: Tensor, iou: float, count: int
) -> tuple[Tensor, Tensor]:
    """The `count` best candidates of each image that suppression within its groups leaves.

    boxes: [B, N, 4] xyxy. scores: [B, N]. groups: [B, N] int64 >= 0 (level or class); boxes of different groups do
    not suppress each other. valid: [B, N]; the others are dropped. iou: suppress above it. Returns
    (index [B, min(count, N)], best first, kept [B, min(count, N)]); places beyond an image's survivors are not kept.
    """
    images = torch.arange(len(boxes), device=boxes.device)[:, None]
    images_and_groups = (groups * len(boxes) + images)[valid]
    survivors = batched_nms(boxes[valid].float(), scores[valid].float(), images_and_groups, iou)
    kept = torch.zeros_like(valid).flatten()
    kept[valid.flatten().nonzero()[survivors, 0]] = True
    kept = kept.view_as(valid)
    index = scores.masked_fill(~kept, -torch.inf).topk(min(count, scores.shape[1]), dim=1).indices
    return index, kept.gather(1, index)
