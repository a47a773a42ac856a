"""Cross-attention of the queries to the memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codetr.models.query_position import Placement
from codetr.nn.deformable_attention import DeformableAttention
from codetr.nn.mlp import xavier
from codetr.types import Memory


class DeformableCrossAttention(nn.Module):
    """Deformable attention around the references (Deformable DETR, sec. 4.1)."""

    wants_location = False

    def __init__(self, width: int, num_heads: int, num_levels: int, num_points: int) -> None:
        super().__init__()
        self.attention = DeformableAttention(width, num_heads, num_levels, num_points)

    def forward(self, content: Tensor, placement: Placement, reference: Tensor, memory: Memory) -> Tensor:
        """content: [B, N, C]. reference: [B, N, 2 or 4], normalised to the unpadded image. Returns [B, N, C]."""
        ratios = memory.valid_ratios[:, None]
        if reference.shape[-1] == 4:
            ratios = torch.cat([ratios, ratios], -1)
        return self.attention(content + placement.position, reference[:, :, None] * ratios, memory)


class ConditionalCrossAttention(nn.Module):
    """Dense attention whose queries and keys are a content half beside a spatial half (Conditional DETR, sec. 3.2).

    dropout: of the attention weights.
    """

    wants_location = True

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.query = nn.Linear(width, width)
        self.query_location = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.key_position = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)
        xavier(self)

    def forward(self, content: Tensor, placement: Placement, reference: Tensor, memory: Memory) -> Tensor:
        """content: [B, N, C]; the placement must bring a location. Returns [B, N, C]."""
        query, key = self.query_key(content, placement, memory)
        out = F.scaled_dot_product_attention(
            query,
            key,
            self._heads(self.value(memory.tokens)),
            attn_mask=~memory.padding[:, None, None],
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.output(out.transpose(1, 2).flatten(2))

    def query_key(self, content: Tensor, placement: Placement, memory: Memory) -> tuple[Tensor, Tensor]:
        """[B, H, N, 2 C / H] and [B, H, S, 2 C / H], from whose products the weights come."""
        query, key = self.query(content), self.key(memory.tokens)
        key_position = self.key_position(memory.position)
        if placement.added is not None:
            query, key = query + placement.added, key + key_position
        query = torch.cat([self._heads(query), self._heads(self.query_location(placement.location))], -1)
        return query, torch.cat([self._heads(key), self._heads(key_position)], -1)

    def _heads(self, x: Tensor) -> Tensor:
        """[B, n, C] -> [B, H, n, C / H]."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
