"""RoIAlign over the levels of a pyramid by torchvision: one call per level."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import roi_align

NOWHERE = -1e4  # pixels: RoIAlign finds nothing, 0, in a box with all its corners here, at any sampling ratio


def roi_align_reference(
    levels: Sequence[Tensor],
    strides: Sequence[int],
    images: Tensor,
    boxes: Tensor,
    level_of: Tensor,
    size: int,
    sampling_ratio: int,
) -> Tensor:
    """RoIAlign (Mask R-CNN, sec. 3) of each region on its level, without the half cell's shift of its first versions.

    levels: [B, C, H_j, W_j]. strides: pixels per cell of each. images: [R] int64, the image of each region.
    boxes: [R, 4] xyxy in pixels. level_of: [R] int64; a region of a negative level is zero. size: cells per side.
    sampling_ratio: samples per cell and axis, 0: as many as the pixels beneath. Returns [R, C, size, size] in the dtype
    of boxes, in which it computes.

    Every level pools all boxes, those of other levels `NOWHERE`, which is little work: sorting the boxes by level would
    make the host wait for their numbers.
    """
    image, found = images[:, None].to(boxes), boxes.new_zeros(())
    for number, (level, stride) in enumerate(zip(levels, strides, strict=True)):
        own = (level_of == number)[:, None]
        # `NOWHERE` with an area: OpenVINO divides by it.
        rois = torch.cat([image, boxes[:, :2].where(own, NOWHERE), boxes[:, 2:].where(own, NOWHERE + 16)], 1)
        found = roi_align(level.to(rois), rois, size, 1 / stride, sampling_ratio, aligned=True).add_(found)
    return found
