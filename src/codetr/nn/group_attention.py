"""Self-attention among the queries of a group, for all groups of a decoder pass at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codetr.nn.mlp import xavier
from codetr.types import QueryGroup


@dataclass(frozen=True)
class Bucket:
    """Groups whose blocks have one size, attended to in one call.

    members: numbers of the groups. blocks: of all members. sees: numbers of the further groups that they attend to.
    mask: [B * blocks, 1, 1 or n, keys] bool, True = attend; None for all.
    """

    members: tuple[int, ...]
    blocks: int
    sees: tuple[int, ...]
    mask: Tensor | None


@dataclass(frozen=True)
class AttentionPlan:
    """sizes: queries of every group."""

    sizes: tuple[int, ...]
    buckets: tuple[Bucket, ...]


def attention_plan(groups: dict[str, QueryGroup]) -> AttentionPlan:
    """Sort groups into calls of scaled-dot-product attention: equal groups without a mask share one."""
    numbers = {name: number for number, name in enumerate(groups)}
    sizes = tuple(group.content.shape[1] for group in groups.values())
    folded: dict[tuple, list[int]] = defaultdict(list)
    masked = []
    for number, group in enumerate(groups.values()):
        sees = tuple(numbers[name] for name in group.sees)
        if group.valid is None and group.parts is None:
            folded[sizes[number] // group.blocks, sees].append(number)
        else:
            mask = _key_mask(group, sum(sizes[other] for other in sees))
            masked.append(Bucket((number,), group.blocks, sees, mask))
    plain = [
        Bucket(tuple(members), sum(sizes[number] for number in members) // size, sees, None)
        for (size, sees), members in folded.items()
    ]
    return AttentionPlan(sizes, (*plain, *masked))


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

    def forward(self, content: Tensor, position: Tensor, plan: AttentionPlan) -> Tensor:
        """content, position: [B, N, C]. Returns [B, N, C]."""
        if self.position is None:
            query_key = self.query_key(content + position)
        else:
            query_key = self.query_key(content) + self.position(position)
        query_key = query_key.unflatten(-1, (2, self.num_heads, -1)).split(plan.sizes, 1)
        value = self.value(content).unflatten(-1, (self.num_heads, -1)).split(plan.sizes, 1)
        pieces: dict[int, Tensor] = {}
        for bucket in plan.buckets:
            pieces |= zip(bucket.members, self._attend(query_key, value, bucket, plan.sizes), strict=True)
        return self.output(torch.cat([pieces[number] for number in range(len(plan.sizes))], 1))

    def _attend(
        self, query_key: Sequence[Tensor], value: Sequence[Tensor], bucket: Bucket, sizes: tuple[int, ...]
    ) -> Sequence[Tensor]:
        """query_key: of every group [B, n, 2, H, D]. value: [B, n, H, D]. Returns [B, n, C] of every member."""
        query, key = _folded([query_key[i] for i in bucket.members], bucket.blocks).permute(2, 0, 3, 1, 4).unbind()
        values = _folded([value[i] for i in bucket.members], bucket.blocks).transpose(1, 2)
        if bucket.sees:
            key = _with_seen(key, [query_key[i][:, :, 1] for i in bucket.sees], bucket.blocks)
            values = _with_seen(values, [value[i] for i in bucket.sees], bucket.blocks)
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(query, key, values, attn_mask=bucket.mask, dropout_p=dropout)
        out = out.transpose(1, 2).reshape(value[0].shape[0], -1, self.output.in_features)
        return out.split([sizes[i] for i in bucket.members], 1)


def _folded(parts: list[Tensor], blocks: int) -> Tensor:
    """[B, n, ...] of every member -> [B * blocks, queries of a block, ...]."""
    whole = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    return whole if blocks == 1 else whole.unflatten(1, (blocks, -1)).flatten(0, 1)


def _with_seen(own: Tensor, seen: list[Tensor], blocks: int) -> Tensor:
    """own: [B * blocks, H, n, D]. seen: [B, m, H, D] of other groups. Returns [B * blocks, H, n + all m, D]."""
    others = torch.cat(seen, 1).transpose(1, 2)
    return torch.cat([own, others.repeat_interleave(blocks, 0)], 2)


def _key_mask(group: QueryGroup, seen: int) -> Tensor:
    """[B * blocks, 1, 1 or n, keys] bool, True = attend; a query that may not attend to any of its own block attends to
    all of it. seen: keys of other groups."""
    own = None
    if group.valid is not None:
        own = group.valid.unflatten(1, (group.blocks, -1)).flatten(0, 1)[:, None]
    if group.parts is not None:
        together = (group.parts[:, None] == group.parts)[None]
        own = together if own is None else own & together
    assert own is not None, "only groups with a mask need one"
    own = own | ~own.any(-1, keepdim=True)
    return F.pad(own, (0, seen), value=True)[:, None]
