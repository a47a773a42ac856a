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

    wants_location, wants_masks = False, False

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

    wants_location, wants_masks = True, False

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
        return _heads(x, self.num_heads)


class MaskedCrossAttention(nn.Module):
    """Dense attention to the cells inside each query's mask, on the level of the placement (Mask2Former, sec. 3.2.1).

    A query whose mask is empty there attends to the whole image.

    dropout: of the attention weights.
    """

    wants_location, wants_masks = False, True

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)
        xavier(self)

    def forward(self, content: Tensor, placement: Placement, reference: Tensor, memory: Memory) -> Tensor:
        """content: [B, N, C]. reference: [B, N, E], embeddings of masks. Returns [B, N, C]."""
        cells = _cells(memory, placement.level)
        tokens = memory.tokens[:, cells]
        query, key = self.query(content + placement.position), self.key(tokens + memory.position[:, cells])
        out = F.scaled_dot_product_attention(
            _heads(query, self.num_heads),
            _heads(key, self.num_heads),
            _heads(self.value(tokens), self.num_heads),
            attn_mask=inside(reference, memory, cells)[:, None],
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.output(out.transpose(1, 2).flatten(2))


@torch.no_grad()
def inside(reference: Tensor, memory: Memory, cells: slice) -> Tensor:
    """[B, N, cells] bool: inside the mask of each query, or in the image where none of the image's cells is.

    reference: [B, N, E], embeddings of masks.
    """
    assert memory.pixels is not None, "MaskDecoder asks for them"
    in_image = ~memory.padding[:, None, cells]
    in_mask = (reference @ memory.pixels.tokens[:, cells].transpose(1, 2) >= 0) & in_image
    return torch.where(in_mask.any(-1, keepdim=True), in_mask, in_image)


def _cells(memory: Memory, level: int | None) -> slice:
    """Of one level among the memory's tokens; None: all."""
    if level is None:
        return slice(None)
    sizes = [height * width for height, width in memory.spatial_shapes]
    return slice(sum(sizes[:level]), sum(sizes[: level + 1]))


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, n, C] -> [B, H, n, C / H]."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)
