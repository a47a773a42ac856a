"""The mask branch of Mask R-CNN (He et al. 2017, sec. 3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torchvision.ops import roi_align

from codetr.errors import UserError
from codetr.heads.roi import RoIPool
from codetr.nn.class_rows import by_class
from codetr.ops.normaliser import normaliser
from codetr.types import Pyramid, Targets


class MaskBranch(nn.Module):
    """RoIAlign, convolutions, one upsampling, and a mask per class of twice the pool's size.

    Loss: cross entropy of every pixel of the positive regions, for the class of their object alone, times `weight`.
    """

    def __init__(self, pool: RoIPool, width: int, num_convs: int, num_classes: int, weight: float) -> None:
        super().__init__()
        self.pool, self.weight = pool, weight
        convs = [m for _ in range(num_convs) for m in (nn.Conv2d(width, width, 3, padding=1), nn.ReLU(True))]
        self.convs = nn.Sequential(*convs)
        self.upsample = nn.ConvTranspose2d(width, width, 2, stride=2)
        self.classes = by_class(nn.Conv2d(width, num_classes, 1))
        for layer in (*self.convs[::2], self.upsample, self.classes):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(layer.bias)

    def forward(self, pyramid: Pyramid, images: Tensor, boxes: Tensor) -> Tensor:
        """images: [R], the image of each box. boxes: [R, 4] xyxy in pixels. Returns logits [R, K, 2s, 2s], float32."""
        features = self.convs(self.pool.regions(pyramid, images, boxes))
        return self.classes(self.upsample(features).relu()).float()

    def loss(self, pyramid: Pyramid, boxes: Tensor, matched_index: Tensor, targets: Targets) -> Tensor:
        """boxes: [B, R, 4] xyxy in pixels.
        matched_index: [B, R], the object of positive regions, negative elsewhere.

        Raises UserError when the targets come without masks.
        """
        if targets.masks is None:
            raise UserError("the mask branch of Mask R-CNN needs the objects' masks: set data.masks=true")
        images, places = torch.where(matched_index >= 0)
        boxes, matched_index = boxes[images, places], matched_index[images, places]
        logits = self(pyramid, images, boxes)
        own = logits[torch.arange(len(logits), device=logits.device), targets.labels[images, matched_index]]
        target_mask = region_masks(targets.masks, targets.valid, images, matched_index, boxes, own.shape[-1])
        entropy = binary_cross_entropy_with_logits(own, target_mask, reduction="none").mean((1, 2))
        count = normaliser(entropy.new_tensor(float(len(entropy)))).clamp(min=1)
        return entropy.sum() / count * self.weight


@torch.no_grad()
def region_masks(
    masks: Tensor, valid: Tensor, images: Tensor, matched_index: Tensor, boxes: Tensor, size: int
) -> Tensor:
    """What each region shows of its object's mask: [R, size, size], 0 or 1.

    masks: [B, M, H, W] bool.
    valid: [B, M], the objects.
    images, matched_index: [R].
    boxes: [R, 4] xyxy in pixels.
    """
    return crop_masks(*objects_and_rois(masks, valid, images, matched_index, boxes), size)


def objects_and_rois(
    masks: Tensor, valid: Tensor, images: Tensor, matched_index: Tensor, boxes: Tensor
) -> tuple[Tensor, Tensor]:
    """What `crop_masks` takes, from the arguments of `region_masks`: objects [n, 1, H, W], 0 or 1; rois [R, 5]."""
    places = valid.flatten().cumsum(0).view_as(valid) - 1  # of the objects among the valid ones
    rois = torch.cat([places[images, matched_index][:, None].to(boxes), boxes], 1)
    # Only real objects: as floats the masks of large images are the head's largest tensor.
    return masks[valid][:, None].to(boxes), rois


@torch.no_grad()
def crop_masks(objects: Tensor, rois: Tensor, size: int) -> Tensor:
    """[R, size, size], 0 or 1. rois: [R, 5], the object's place and xyxy in pixels."""
    return (roi_align(objects, rois, size, 1.0, 0, aligned=True)[:, 0] >= 0.5).to(rois)
