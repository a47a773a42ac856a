"""Which boxes a head of regions learns from."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from codetr.assign import BACKGROUND, IGNORED
from codetr.assign.max_iou import assign_max_iou
from codetr.assign.sampling import pack, sample_both
from codetr.ops.gather import take
from codetr.types import Targets


class Regions(NamedTuple):
    """Sampled regions: boxes [B, R, 4] xyxy in pixels, matched_index [B, R] (object index, BACKGROUND or IGNORED)."""

    boxes: Tensor
    matched_index: Tensor


@torch.no_grad()
def sample_regions(
    proposals: Tensor,
    valid: Tensor,
    targets: Targets,
    positive_iou: float,
    most_positive: int,
    num_samples: int,
) -> Regions:
    """The objects themselves and the proposals, assigned, then sampled to a fixed number, positives first.

    proposals: [B, P, 4] xyxy in pixels.
    valid: [B, P].
    positive_iou: below it a proposal is background.
    """
    boxes = targets.boxes_xyxy
    matched_index = assign_max_iou(proposals, valid, boxes, targets.valid, positive_iou, positive_iou, low_quality=None)
    itself = torch.arange(boxes.shape[1], device=boxes.device).where(targets.valid, IGNORED)
    matched_index = torch.cat([itself, matched_index], 1)
    chosen = sample_both(matched_index >= 0, matched_index == BACKGROUND, most_positive, num_samples)
    index, kept = pack(*chosen, num_samples)
    boxes = take(torch.cat([boxes, proposals], 1), index)
    return Regions(boxes, matched_index.gather(1, index).masked_fill(~kept, IGNORED))
