"""Assignment by thresholds on the IoU (Faster R-CNN, sec. 3.1.2)."""

import torch
from torch import Tensor
from torchvision.ops import box_iou

from codetr.assign import BACKGROUND, IGNORED


def assign_max_iou(
    candidates: Tensor,
    candidate_valid: Tensor,
    boxes: Tensor,
    valid: Tensor,
    positive: float,
    negative: float,
    low_quality: float | None,
) -> Tensor:
    """Candidates take the object of highest IoU if that is >= `positive`, background if it is < `negative`.

    low_quality: every object whose best IoU is >= this, and above 0, also takes all candidates that reach that best
    IoU, the last object where several do; None: not. What is left in between, or is not valid, is ignored.

    candidates: [B, N, 4] or shared [N, 4].
    candidate_valid: [B, N].
    boxes: [B, M, 4], M >= 1.
    valid: [B, M].

    All boxes xyxy. Returns [B, N]: object index, BACKGROUND or IGNORED.
    """
    candidates = candidates.expand(len(boxes), -1, -1)
    iou = box_iou(boxes, candidates)
    iou = iou.masked_fill(~(valid[:, :, None] & candidate_valid[:, None, :]), -1)
    best, matched_index = iou.max(1)
    assigned = matched_index.masked_fill(best < positive, IGNORED).masked_fill(best < negative, BACKGROUND)
    if low_quality is not None:
        object_best = iou.amax(2, keepdim=True)
        taken = (iou == object_best) & (object_best >= low_quality) & (object_best > 0)
        one_based = torch.arange(1, iou.shape[1] + 1, device=iou.device, dtype=torch.int32)[:, None]
        last = (taken * one_based).amax(1).long()
        assigned = assigned.where(last == 0, last - 1)
    return assigned.masked_fill(~candidate_valid, IGNORED)
