"""The deformable encoder (Deformable DETR, sec. 4.1 and fig. 1)."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from codetr.nn.deformable_attention import DeformableAttention
from codetr.nn.mlp import FFN
from codetr.nn.position import cell_centres, sine_position
from codetr.types import Memory


class DeformableEncoder(nn.Module):
    """Flattens the neck's levels and lets every token attend to all levels.

    temperature, position_offset: of the sine encoding. checkpointed_layers: the first n layers recompute their
    activations in the backward pass.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        num_levels: int,
        num_points: int,
        ffn_width: int,
        num_layers: int,
        dropout: float,
        temperature: float,
        position_offset: float,
        checkpointed_layers: int,
    ) -> None:
        super().__init__()
        self.temperature, self.position_offset = temperature, position_offset
        self.checkpointed_layers = checkpointed_layers
        self.level_embedding = nn.Parameter(torch.randn(num_levels, width))
        self.layers = nn.ModuleList(
            DeformableEncoderLayer(width, num_heads, num_levels, num_points, ffn_width, dropout)
            for _ in range(num_layers)
        )

    def flatten(self, levels: list[Tensor], padding: Tensor) -> Memory:
        """levels: [B, C, H_l, W_l]. padding: [B, H, W] of the images. Returns the encoder's input."""
        masks = [_resize_mask(padding, x.shape[-2:]) for x in levels]
        positions = [
            sine_position(mask, x.shape[1], self.temperature, self.position_offset) + embedding
            for mask, x, embedding in zip(masks, levels, self.level_embedding, strict=True)
        ]
        return Memory(
            tokens=torch.cat([x.flatten(2).transpose(1, 2) for x in levels], 1),
            position=torch.cat([p.flatten(1, 2) for p in positions], 1).to(levels[0].dtype),
            padding=torch.cat([m.flatten(1) for m in masks], 1),
            spatial_shapes=tuple((x.shape[2], x.shape[3]) for x in levels),
            valid_ratios=torch.stack([_valid_ratio(m) for m in masks], 1),
        )

    def forward(self, levels: list[Tensor], padding: Tensor) -> Memory:
        memory = self.flatten(levels, padding)
        reference = encoder_reference_points(memory)
        for index, layer in enumerate(self.layers):
            if index < self.checkpointed_layers and torch.is_grad_enabled():
                tokens = checkpoint(layer, memory, reference, use_reentrant=False)
            else:
                tokens = layer(memory, reference)
            memory = replace(memory, tokens=tokens)
        return memory


class DeformableEncoderLayer(nn.Module):
    """Deformable self-attention and feed-forward, post-norm."""

    def __init__(
        self, width: int, num_heads: int, num_levels: int, num_points: int, ffn_width: int, dropout: float
    ) -> None:
        super().__init__()
        self.attention = DeformableAttention(width, num_heads, num_levels, num_points)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width)
        self.ffn = FFN(width, ffn_width, dropout)

    def forward(self, memory: Memory, reference: Tensor) -> Tensor:
        """Returns the new tokens [B, S, C]; `memory` is left as it is."""
        tokens = memory.tokens
        attended = self.attention(tokens + memory.position, reference, memory)
        return self.ffn(self.norm(tokens + self.dropout(attended)))


def encoder_reference_points(memory: Memory) -> Tensor:
    """Each cell's centre, in the coordinates of every level: [B, S, L, 2]."""
    centres = cell_centres(memory)
    return centres[:, :, None] * memory.valid_ratios[:, None]


def _resize_mask(padding: Tensor, size: torch.Size) -> Tensor:
    """A cell is padding if its top-left pixel is (nearest interpolation)."""
    return F.interpolate(padding[:, None].float(), size=tuple(size)).squeeze(1).bool()


def _valid_ratio(padding: Tensor) -> Tensor:
    """[B, H, W] -> [B, 2] (width, height) share of cells that are not padding."""
    valid = ~padding
    return torch.stack([valid[:, 0].float().mean(1), valid[:, :, 0].float().mean(1)], -1)
