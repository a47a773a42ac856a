"""Self-attention among the queries of a group, for all groups of a decoder pass at once."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codetr.nn.mlp import xavier
from codetr.types import QueryGroup


@dataclass(frozen=True)
class _Span:
    """Queries [start, stop) attend within `blocks` equal parts, and to the spans named in `sees`."""

    start: int
    stop: int
    blocks: int
    sees: tuple[tuple[int, int], ...]

    @property
    def block_size(self) -> int:
        return (self.stop - self.start) // self.blocks


@dataclass(frozen=True)
class Bucket:
    """Spans of one shape, attended to in one call. valid: [B, n] bool over their own queries, None for all. parts: [n],
    own queries of another number are not seen."""

    spans: tuple[_Span, ...]
    valid: Tensor | None = None
    parts: Tensor | None = None


def attention_plan(groups: dict[str, QueryGroup]) -> list[Bucket]:
    """Sort groups into calls of scaled-dot-product attention: equal groups without a mask share one."""
    ends: dict[str, tuple[int, int]] = {}
    start = 0
    for name, group in groups.items():
        ends[name] = (start, start + group.content.shape[1])
        start = ends[name][1]
    folded: dict[tuple, list[_Span]] = defaultdict(list)
    buckets = []
    for name, group in groups.items():
        span = _Span(*ends[name], group.blocks, tuple(ends[other] for other in group.sees))
        if group.valid is None and group.parts is None:
            folded[(span.block_size, span.sees)].append(span)
        else:
            buckets.append(Bucket((span,), group.valid, group.parts))
    return [Bucket(tuple(spans)) for spans in folded.values()] + buckets


class GroupSelfAttention(nn.Module):
    """Multi-head self-attention that never crosses from one query group into another.

    The cost is the sum of the squares of the group sizes, not the square of their sum, and no mask of the size
    of all queries exists, so fused kernels stay usable.

    dropout: of the attention weights.
    separate_position: contents and positions have projections of their own (Conditional DETR), instead of one for their
        sum.
    """

    def __init__(self, width: int, num_heads: int, dropout: float, separate_position: bool) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.query_key = nn.Linear(width, 2 * width)
        self.position = nn.Linear(width, 2 * width) if separate_position else None
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)
        xavier(self)

    def forward(self, content: Tensor, position: Tensor, plan: list[Bucket]) -> Tensor:
        """content, position: [B, N, C]. Returns [B, N, C]."""
        if self.position is None:
            query_key = self.query_key(content + position)
        else:
            query_key = self.query_key(content) + self.position(position)
        query, key = query_key.chunk(2, -1)
        value = self.value(content)
        pieces = {}
        for bucket in plan:
            for span, piece in zip(bucket.spans, self._attend(query, key, value, bucket), strict=True):
                pieces[span.start] = piece
        return self.output(torch.cat([pieces[start] for start in sorted(pieces)], 1))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, bucket: Bucket) -> list[Tensor]:
        first = bucket.spans[0]
        blocks = [span.blocks for span in bucket.spans]
        q, k, v = (self._fold(x, bucket) for x in (query, key, value))
        if first.sees:
            k, v = (self._append_seen(own, x, first, sum(blocks)) for own, x in ((k, key), (v, value)))
        mask = _key_mask(bucket, k.shape[2])
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        out = out.transpose(1, 2).flatten(2).unflatten(0, (-1, sum(blocks)))  # [B, blocks, n, C]
        return [piece.flatten(1, 2) for piece in out.split(blocks, 1)]

    def _fold(self, x: Tensor, bucket: Bucket) -> Tensor:
        """[B, N, C] -> [B * blocks, H, n, C / H], the queries of the bucket's blocks."""
        parts = [x[:, s.start : s.stop].unflatten(1, (s.blocks, s.block_size)) for s in bucket.spans]
        folded = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        return folded.flatten(0, 1).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _append_seen(self, own: Tensor, x: Tensor, span: _Span, blocks: int) -> Tensor:
        seen = torch.cat([x[:, start:stop] for start, stop in span.sees], 1)
        seen = seen.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        return torch.cat([own, seen.repeat_interleave(blocks, 0)], 2)


def _key_mask(bucket: Bucket, num_keys: int) -> Tensor | None:
    """[B * blocks, 1, 1 or n, keys] bool, True = attend, None for all; a query that may not attend to any of its own
    block attends to all of it."""
    span, own = bucket.spans[0], None
    if bucket.valid is not None:
        own = bucket.valid.unflatten(1, (span.blocks, span.block_size)).flatten(0, 1)[:, None]
    if bucket.parts is not None:
        together = bucket.parts[:, None] == bucket.parts
        own = together[None] if own is None else own & together
    if own is None:
        return None
    own = own | ~own.any(-1, keepdim=True)
    return torch.cat([own, own.new_ones(*own.shape[:2], num_keys - own.shape[2])], -1)[:, None]
