"""Multi-scale deformable attention with gathers: few operations, that every runtime has, for exported graphs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .reference import padding_of, sampling_locations


def deformable_attention_gathered(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    reference: Tensor,
    offsets: Tensor,
    logits: Tensor,
    valid_sizes: Tensor,
) -> Tensor:
    """As `deformable_attention_reference`, all levels at once, without `grid_sample`.

    TensorRT miscompiles that one from 10.14 on (TensorRT#4813), and ONNX Runtime is slow at it. Where a location falls
    between four cells, each adds its row of `value`, by its share.
    """
    value = value.masked_fill(padding_of(valid_sizes, spatial_shapes)[..., None, None], 0)
    locations = sampling_locations(reference, offsets, spatial_shapes)
    weights = logits.flatten(3).float().softmax(-1).unflatten(-1, logits.shape[3:])
    return gathered(value, spatial_shapes, locations, weights)


def gathered(value: Tensor, spatial_shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """As `msda_reference`, for locations that are finite."""
    batch, cells, heads, width = value.shape
    sizes, starts = _levels(spatial_shapes, value.device)
    limits = sizes[:, None].to(locations.dtype)
    place = (locations * limits - 0.5).clamp(min=-2.0).minimum(limits + 1)  # farther out nothing is seen either
    low = place.floor()
    share = place - low
    rows = value.transpose(1, 2).reshape(-1, width)
    first = torch.arange(batch * heads, device=value.device).view(batch, 1, heads, 1, 1) * cells + starts[:, None]
    output = None
    for right in (0, 1):
        for below in (0, 1):
            x, y = low[..., 0] + right, low[..., 1] + below
            inside = (x >= 0) & (y >= 0) & (x < limits[..., 0]) & (y < limits[..., 1])
            part = (share[..., 0] if right else 1 - share[..., 0]) * (share[..., 1] if below else 1 - share[..., 1])
            index = first + (y.long() * sizes[:, None, 0] + x.long())
            seen = rows[index.where(inside, 0).flatten()].view(*index.shape[:3], -1, width)  # [B, Q, H, L * P, D]
            share_of_corner = (part * weights * inside).flatten(3)
            new = (share_of_corner[..., None, :].to(seen.dtype) @ seen)[..., 0, :]
            output = new if output is None else output + new
    return output.flatten(2)


def _levels(spatial_shapes: Sequence[tuple[int, int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """[L, 2] (width, height) of each level, and [L] its first cell."""
    sizes = torch.tensor([(width, height) for height, width in spatial_shapes]).to(device)
    cells = sizes.prod(-1)
    return sizes, cells.cumsum(0) - cells
