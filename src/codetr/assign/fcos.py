"""Assignment of points to the objects they lie in (FCOS, Tian et al. 2019, sec. 3.1 and 3.2)."""

import torch
from torch import Tensor

from codetr.assign import BACKGROUND, IGNORED
from codetr.nn.boxes import center_size, point_distances


def assign_fcos(
    points: Tensor,
    point_valid: Tensor,
    radius: Tensor | None,
    limits: Tensor,
    boxes: Tensor,
    valid: Tensor,
) -> Tensor:
    """A point takes the smallest object that it lies in and whose farthest side suits its level, the first of equals.

    points: [N, 2] (x, y), shared by all images.
    point_valid: [B, N]; the others are ignored.
    radius: [N] half side of the square around an object's centre in which its points must lie (centre sampling); None:
        anywhere in the object.
    limits: [N, 2] least and greatest distance to the farthest side.
    boxes: [B, M, 4], M >= 1, xyxy.
    valid: [B, M].

    All in pixels. Returns [B, N]: object index, BACKGROUND or IGNORED.
    """
    distances = point_distances(points[None, :, None], boxes[:, None])  # [B, N, M, 4]
    inside = distances.amin(-1) > 0
    if radius is not None:
        centres, _ = center_size(boxes)
        low = torch.maximum(centres[:, None] - radius[:, None, None], boxes[:, None, :, :2])
        high = torch.minimum(centres[:, None] + radius[:, None, None], boxes[:, None, :, 2:])
        inside = point_distances(points[None, :, None], torch.cat([low, high], -1)).amin(-1) > 0
    farthest = distances.amax(-1)
    suits = (farthest >= limits[:, :1]) & (farthest <= limits[:, 1:])
    area = (boxes[..., 2:] - boxes[..., :2]).prod(-1)[:, None].expand_as(farthest)
    area = area.masked_fill(~(inside & suits & valid[:, None]), torch.inf)
    least, matched_index = area.min(-1)
    return matched_index.masked_fill(least.isinf(), BACKGROUND).masked_fill(~point_valid, IGNORED)
