"""Multi-scale deformable attention with `grid_sample`: slow, differentiable, exportable, and right."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def msda_reference(
    value: Tensor, spatial_shapes: Sequence[tuple[int, int]], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Weighted sum of bilinear samples over all levels and points (Deformable DETR, sec. 4.1, eq. 3).

    value: [B, S, H, D], the levels flattened and concatenated. spatial_shapes: (height, width) per level, plain
    integers whose products sum to S. sampling_locations: [B, Q, H, L, P, 2], (x, y) with 0 and 1 at the outer edges
    of a level (`align_corners=False`); the map is zero outside. attention_weights: [B, Q, H, L, P].
    Returns [B, Q, H * D] in value's dtype. Computes in the widest of the three dtypes, in float32 at the least.

    A location that is not finite counts as outside: the slot adds nothing and gets no gradient.
    """
    dtype = torch.promote_types(torch.promote_types(value.dtype, sampling_locations.dtype), torch.float32)
    dtype = torch.promote_types(dtype, attention_weights.dtype)
    grids = sampling_locations.to(dtype)
    # Beyond one cell outside nothing is seen, at any map size, and grid_sample knows what to do with finite numbers.
    grids = torch.where(grids.isfinite(), grids, -2.0).clamp(-2, 3) * 2 - 1
    levels = value.to(dtype).split([height * width for height, width in spatial_shapes], 1)
    batch, _, heads, channels = value.shape
    output = grids.new_zeros(batch * heads, channels, sampling_locations.shape[1])
    for level, (maps, shape) in enumerate(zip(levels, spatial_shapes, strict=True)):
        if 0 in shape:
            continue
        maps = maps.permute(0, 2, 3, 1).flatten(0, 1).unflatten(-1, shape)
        grid = grids[:, :, :, level].transpose(1, 2).flatten(0, 1)
        weights = attention_weights[:, :, :, level].to(dtype).transpose(1, 2).flatten(0, 1)
        samples = F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        output = output + (samples * weights[:, None]).sum(-1)
    return output.unflatten(0, (batch, heads)).permute(0, 3, 1, 2).flatten(2).to(value.dtype)


def deformable_attention_reference(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    reference: Tensor,
    offsets: Tensor,
    logits: Tensor,
    valid_sizes: Tensor | None = None,
) -> Tensor:
    """`msda_reference` with what comes before it: locations, softmax over levels and points, padded cells as zeros.

    reference: [B, Q, L, 2 or 4], points or boxes (cx, cy, w, h), normalised to the padded map of each level.
    offsets: [B, Q, H, L, P, 2], see `sampling_locations`. logits: [B, Q, H, L, P]. valid_sizes: [B, L, 2]
    int32, (height, width) of the upper left part of each map that is not padding; the rest counts as zero, whatever
    stands there. Otherwise as there.
    """
    if valid_sizes is not None:
        value = value.masked_fill(padding_of(valid_sizes, spatial_shapes)[..., None, None], 0)
    wide = torch.promote_types(logits.dtype, torch.float32)
    weights = logits.flatten(3).to(wide).softmax(-1).view(logits.shape)
    return msda_reference(value, spatial_shapes, sampling_locations(reference, offsets, spatial_shapes), weights)


def sampling_locations(reference: Tensor, offsets: Tensor, spatial_shapes: Sequence[tuple[int, int]]) -> Tensor:
    """Where to sample: offsets count cells around a point, or half box widths over P around a box.

    reference: [B, Q, L, 2 or 4]. offsets: [B, Q, H, L, P, 2]. Returns [B, Q, H, L, P, 2] in [0, 1] of each level,
    in float32 at the least: bfloat16 cannot name a cell on a large map (Deformable DETR, appendix A.3 and A.4).
    """
    reference = reference[:, :, None, :, None].to(torch.promote_types(reference.dtype, torch.float32))
    if reference.shape[-1] == 2:
        sizes = torch.tensor([(max(w, 1), max(h, 1)) for h, w in spatial_shapes], dtype=reference.dtype)
        cells = sizes.to(offsets.device, non_blocking=True)
        return reference + offsets / cells.view(-1, 1, 2)
    return reference[..., :2] + offsets / offsets.shape[-2] * reference[..., 2:] * 0.5


def padding_of(valid_sizes: Tensor, spatial_shapes: Sequence[tuple[int, int]]) -> Tensor:
    """valid_sizes: [B, L, 2] (height, width). Returns [B, S], True on the cells beyond."""
    parts, device = [], valid_sizes.device
    for level, (height, width) in enumerate(spatial_shapes):
        below = torch.arange(height, device=device) >= valid_sizes[:, level, :1]
        beside = torch.arange(width, device=device) >= valid_sizes[:, level, 1:]
        parts.append((below[:, :, None] | beside[:, None]).flatten(1))
    return torch.cat(parts, 1)
