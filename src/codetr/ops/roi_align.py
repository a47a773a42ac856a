"""The one door to RoIAlign over the levels of a pyramid."""

from collections.abc import Sequence

import torch
from torch import Tensor

from codetr.kernels.roi_align import roi_align, roi_align_reference
from codetr.ops.choice import Operation

ROI_ALIGN = Operation("RoIAlign", "CODETR_ROI_ALIGN", cpu="numba")


def roi_align_pyramid(
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
    of boxes.

    The environment variable CODETR_ROI_ALIGN=reference|numba overrides the choice; a UserError where that cannot be.
    """
    if torch.compiler.is_exporting():
        boxes = _with_area(boxes)
    run = roi_align if ROI_ALIGN.takes_kernel(boxes, *levels) else roi_align_reference
    return run(levels, strides, images, boxes, level_of, size, sampling_ratio)


def _with_area(boxes: Tensor) -> Tensor:
    """At least a thousandth of a pixel wide and high: of a box without area OpenVINO makes NaN, PyTorch a point."""
    corner, other = boxes.split(2, 1)
    return torch.cat([corner, other.maximum(corner + 1e-3)], 1)
