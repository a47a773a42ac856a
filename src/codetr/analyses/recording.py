"""Where the decoder's queries look: the weights of their cross-attention, recorded beside the model.

A hook computes them anew from what the attention is given. Outside of the block of `recorded` there is no hook: the
model has no code for this, and costs, exports and compiles as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from codetr.errors import UserError
from codetr.kernels.msda.reference import sampling_locations
from codetr.models.cross_attention import ConditionalCrossAttention, DeformableCrossAttention
from codetr.models.decoder import GroupDecoder
from codetr.models.query_position import Placement
from codetr.nn.deformable_attention import DeformableAttention
from codetr.types import Memory, Shapes


@contextmanager
def recorded(decoder: GroupDecoder, layer: int) -> Iterator[list[Tensor]]:
    """Within the block every pass adds what its queries attend to: [B, N, S] over the tokens of the memory, the mean of
    all heads.

    layer: number of the decoder's, from 0, or from the last one, -1. Raises UserError for a layer that is not there,
    and for a cross-attention of another package.
    """
    if not -len(decoder.layers) <= layer < len(decoder.layers):
        raise UserError(f"figure.layer={layer}: the decoder has {len(decoder.layers)} layers")
    attention: nn.Module = decoder.layers[layer].cross_attention  # type: ignore[assignment]
    weights: Any = None
    if isinstance(attention, DeformableCrossAttention):
        attention = attention.attention
        weights = partial(deformable_weights, attention)
    elif isinstance(attention, ConditionalCrossAttention):
        weights = partial(dense_weights, attention)
    else:
        raise UserError(
            f"the weights of {type(attention).__name__} are not known here: give it a function beside these"
        )
    maps: list[Tensor] = []
    handle = attention.register_forward_pre_hook(lambda _, given: maps.append(weights(*given)))
    try:
        yield maps
    finally:
        handle.remove()


def dense_weights(
    attention: ConditionalCrossAttention, content: Tensor, placement: Placement, reference: Tensor, memory: Memory
) -> Tensor:
    """What `ConditionalCrossAttention` multiplies its values with, the mean of all heads: [B, N, S]."""
    query, key = attention.query_key(content, placement, memory)
    logits = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    return logits.masked_fill(memory.padding[:, None, None], -torch.inf).softmax(-1).mean(1)


def deformable_weights(attention: DeformableAttention, query: Tensor, reference: Tensor, memory: Memory) -> Tensor:
    """What `DeformableAttention` multiplies its values with, the mean of all heads: [B, N, S]; nothing on padding."""
    grid = (attention.num_heads, attention.num_levels, attention.num_points)
    offsets = attention.sampling_offsets(query).unflatten(-1, (*grid, 2))
    weights = attention.attention_weights(query).unflatten(-1, (grid[0], -1)).softmax(-1).unflatten(-1, grid[1:])
    locations = sampling_locations(reference, offsets, memory.spatial_shapes)
    return splat(locations, weights, memory.spatial_shapes).mean(2).masked_fill(memory.padding[:, None], 0)


def splat(locations: Tensor, weights: Tensor, shapes: Shapes) -> Tensor:
    """Share every weight out to the four cells around its location, as bilinear interpolation reads them.

    locations: [B, N, H, L, P, 2], (x, y) with 0 and 1 at the outer edges of a level; what lies outside is lost.
    weights: [B, N, H, L, P].
    shapes: (height, width) per level.

    Returns [B, N, H, S].
    """
    parts = []
    for level, (height, width) in enumerate(shapes):
        size = torch.tensor([width, height], dtype=locations.dtype, device=locations.device)
        x, y = (locations[:, :, :, level] * size - 0.5).unbind(-1)
        cells = weights.new_zeros(*weights.shape[:3], height * width)
        for right, below in ((0, 0), (0, 1), (1, 0), (1, 1)):
            column, row = x.floor() + right, y.floor() + below
            share = (1 - (x - column).abs()) * (1 - (y - row).abs()) * weights[:, :, :, level]
            inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            index = (row * width + column).where(inside, 0).long()
            cells.scatter_add_(-1, index, share.where(inside, 0).to(cells.dtype))
        parts.append(cells)
    return torch.cat(parts, -1)
