"""Non-maximum suppression for a whole batch at once."""

import torch
from torch import Tensor

from codetr.kernels.suppression import survivors
from codetr.ops.gather import largest


def best_after_nms(
    boxes: Tensor, scores: Tensor, groups: Tensor, valid: Tensor, iou: float, count: int
) -> tuple[Tensor, Tensor]:
    """The `count` best candidates of each image that suppression within its groups leaves.

    boxes: [B, N, 4] xyxy. scores: [B, N]. groups: [B, N] int64 >= 0 (level or class); boxes of different groups do
    not suppress each other. valid: [B, N]; the others are dropped. iou: suppress above it. Returns
    (index [B, min(count, N)], best first, kept [B, min(count, N)]); places beyond an image's survivors are not kept.
    """
    # A box without area suppresses nothing. Dropping it instead would make the host wait for the number that is left.
    boxes = boxes.detach().float().where(valid[..., None], 0)
    kept = survivors(boxes, scores.detach().float(), groups, iou) & valid
    index = largest(scores.masked_fill(~kept, -torch.inf), count)
    return index, kept.gather(1, index)
