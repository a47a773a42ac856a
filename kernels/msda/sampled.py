"""Multi-scale deformable attention with `grid_sample`, in the order that runtimes do well, for exported graphs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import padding_of


def deformable_attention_sampled(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    reference: Tensor,
    offsets: Tensor,
    logits: Tensor,
    valid_sizes: Tensor,
) -> Tensor:
    """As `deformable_attention_reference`, for locations that are finite, and without autocast, which would make the
    products of places too coarse.

    Runtimes repeat numbers over short inner axes slowly (the two coordinates of a point, its four points), and sum
    over them slowly: places are made in rows of all heads, levels and points, and the sum runs over whole rows.
    """
    value = value.masked_fill(padding_of(valid_sizes, spatial_shapes)[..., None, None], 0)
    weights = logits.flatten(3).float().softmax(-1).unflatten(-1, logits.shape[3:])
    return sampled(value, spatial_shapes, grids(reference, offsets, spatial_shapes), weights)


def grids(reference: Tensor, offsets: Tensor, spatial_shapes: Sequence[tuple[int, int]]) -> Tensor:
    """`sampling_locations` as `grid_sample` wants them, from -1 to 1 on each level: [B, Q, H, L, P, 2]."""
    heads, levels, points = offsets.shape[2:5]
    reference = reference.to(torch.promote_types(reference.dtype, torch.float32))
    # Numbers of levels, [L * 2], to those of all heads, levels and points, [H * L * P * 2]: a product with zeros and
    # ones, which is faster than repeating them.
    repeat = torch.eye(levels * 2, dtype=reference.dtype, device=reference.device).view(-1, 1, levels, 1, 2)
    repeat = repeat.expand(-1, heads, levels, points, 2).flatten(1)
    if reference.shape[-1] == 2:
        sizes = torch.tensor([(max(w, 1), max(h, 1)) for h, w in spatial_shapes]).to(reference)
        steps = (2 / sizes).view(-1, 1, 2).expand(heads, levels, points, 2).flatten()
    else:
        steps = (reference[..., 2:] / points).flatten(2) @ repeat
    centres = (reference[..., :2] * 2 - 1).flatten(2) @ repeat
    # Beyond one cell outside nothing is seen, at any map size.
    return (centres + offsets.flatten(2) * steps).clamp(-5, 5).view(offsets.shape)


def sampled(value: Tensor, spatial_shapes: Sequence[tuple[int, int]], grid: Tensor, weights: Tensor) -> Tensor:
    """value: [B, S, H, D]. grid: [B, Q, H, L, P, 2]. weights: [B, Q, H, L, P]. Returns [B, Q, H * D]."""
    batch, _, heads, _ = value.shape
    dtype = torch.promote_types(value.dtype, torch.float32)
    grid = grid.to(dtype).permute(0, 2, 3, 4, 1, 5).flatten(0, 1)  # [B * H, L, P, Q, 2]
    weights = weights.to(dtype).permute(0, 2, 3, 4, 1).flatten(0, 1)
    output = None
    for level, (maps, shape) in enumerate(
        zip(value.to(dtype).split([height * width for height, width in spatial_shapes], 1), spatial_shapes, strict=True)
    ):
        maps = maps.permute(0, 2, 3, 1).flatten(0, 1).unflatten(-1, shape)
        seen = F.grid_sample(maps, grid[:, level], mode="bilinear", padding_mode="zeros", align_corners=False)
        new = (seen * weights[:, None, level]).sum(-2)
        output = new if output is None else output + new
    assert output is not None
    return output.unflatten(0, (batch, heads)).permute(0, 3, 1, 2).flatten(2).to(value.dtype)
