"""Suppression by torchvision, image by image."""

import torch
from torch import Tensor
from torchvision.ops import batched_nms


def suppress(boxes: Tensor, scores: Tensor, groups: Tensor, iou: float) -> Tensor:
    """As `survivors`."""
    kept = torch.zeros_like(scores, dtype=torch.bool)
    # Image by image torchvision does not begin to sort boxes by group on a GPU.
    for image, parts in enumerate(zip(boxes, scores, groups, strict=True)):
        kept[image].index_fill_(0, batched_nms(*parts, iou), True)
    return kept
