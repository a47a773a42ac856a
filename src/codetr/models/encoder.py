"""Encoders: deformable over all levels (Deformable DETR), dense over one (DETR)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from codetr.nn.deformable_attention import DeformableAttention
from codetr.nn.mlp import FFN, MLP, Activation, xavier
from codetr.nn.position import cell_centres, sine_position
from codetr.nn.recompute import recomputed
from codetr.ops.once import once
from codetr.types import Memory, Shapes


def flatten_levels(levels: list[Tensor], padding: Tensor, temperature: float, position_offset: float) -> Memory:
    """Feature maps [B, C, H_l, W_l] and the images' padding [B, H, W] as an encoder's input, finest level first.

    temperature, position_offset: of the sine encoding of the cells.
    """
    shapes = tuple((x.shape[2], x.shape[3]) for x in levels)
    first = _first_pixels(shapes, (padding.shape[1], padding.shape[2]), padding.device)
    valid_sizes = _valid_sizes(padding, first)
    return Memory(
        tokens=torch.cat([x.flatten(2).transpose(1, 2) for x in levels], 1),
        position=sine_position(shapes, valid_sizes, levels[0].shape[1], temperature, position_offset).to(
            levels[0].dtype
        ),
        padding=padding.flatten(1)[:, first.index],
        spatial_shapes=shapes,
        valid_sizes=valid_sizes,
        valid_ratios=(valid_sizes / first.shapes).flip(-1),
    )


@dataclass(frozen=True)
class _FirstPixels:
    """The pixel of the padding that decides about a cell: its top-left one (nearest interpolation).

    index: [S], among the pixels of an image.
    rows: [H + 1, L] rows of each level that begin above a row of pixels; columns: [W + 1, L], likewise.
    shapes: [L, 2] (height, width) of the levels.
    """

    index: Tensor
    rows: Tensor
    columns: Tensor
    shapes: Tensor


@once
def _first_pixels(shapes: Shapes, size: tuple[int, int], device: torch.device) -> _FirstPixels:
    """size: (height, width) of the padding."""
    rows = [_firsts(height, size[0], device) for height, _ in shapes]
    columns = [_firsts(width, size[1], device) for _, width in shapes]
    ends = [torch.arange(n + 1, device=device)[:, None] for n in size]
    return _FirstPixels(
        index=torch.cat([(y[:, None] * size[1] + x).flatten() for y, x in zip(rows, columns, strict=True)]),
        rows=torch.stack([(y < ends[0]).sum(1) for y in rows], 1).int(),
        columns=torch.stack([(x < ends[1]).sum(1) for x in columns], 1).int(),
        shapes=torch.tensor(shapes).to(device, non_blocking=True),
    )


def _firsts(cells: int, pixels: int, device: torch.device) -> Tensor:
    """The first pixel of each cell along an axis, by float32 as in `torch.nn.functional.interpolate`: [cells]."""
    starts = torch.arange(cells, device=device, dtype=torch.float32) * (pixels / cells)
    return starts.long().clamp(max=pixels - 1)


def _valid_sizes(padding: Tensor, first: _FirstPixels) -> Tensor:
    """[B, H, W] -> [B, L, 2] (height, width) of the cells that are not padding."""
    valid = ~padding
    return torch.stack([first.rows[valid[:, :, 0].sum(1)], first.columns[valid[:, 0].sum(1)]], -1)


class DeformableEncoder(nn.Module):
    """Every token attends to all levels around its own place (Deformable DETR, sec. 4.1 and fig. 1).

    temperature, position_offset: of the sine encoding.
    checkpointed_layers: the first n layers recompute their activations in the backward pass.
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
        self.num_levels = self.memory_levels = num_levels
        self.level_embedding = nn.Parameter(torch.randn(num_levels, width))
        self.layers = nn.ModuleList(
            DeformableEncoderLayer(width, num_heads, num_levels, num_points, ffn_width, dropout)
            for _ in range(num_layers)
        )

    def flatten(self, levels: list[Tensor], padding: Tensor) -> Memory:
        """levels: [B, C, H_l, W_l]. padding: [B, H, W] of the images. Returns the encoder's input."""
        memory = flatten_levels(levels, padding, self.temperature, self.position_offset)
        return replace(memory, position=memory.position + of_cells(self.level_embedding, memory.spatial_shapes))

    def forward(self, levels: list[Tensor], padding: Tensor) -> Memory:
        memory = self.flatten(levels, padding)
        reference = encoder_reference_points(memory)
        for index, layer in enumerate(self.layers):
            tokens = recomputed(layer, memory, reference, when=index < self.checkpointed_layers)
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
        self.ffn = FFN(width, ffn_width, dropout, "relu")

    def forward(self, memory: Memory, reference: Tensor) -> Tensor:
        """Returns the new tokens [B, S, C]; `memory` is left as it is."""
        tokens = memory.tokens
        attended = self.attention(tokens + memory.position, reference, memory)
        return self.ffn(self.norm(tokens + self.dropout(attended)))


class DenseEncoder(nn.Module):
    """The transformer encoder of DETR on a single level: every token attends to every other (DETR, sec. 3.2).

    scaled_position: positions are multiplied by a function of the content in every layer (DAB-DETR). temperature,
    position_offset, checkpointed_layers: as in DeformableEncoder.
    """

    num_levels = memory_levels = 1

    def __init__(
        self,
        width: int,
        num_heads: int,
        ffn_width: int,
        num_layers: int,
        dropout: float,
        activation: Activation,
        scaled_position: bool,
        temperature: float,
        position_offset: float,
        checkpointed_layers: int,
    ) -> None:
        super().__init__()
        self.temperature, self.position_offset = temperature, position_offset
        self.checkpointed_layers = checkpointed_layers
        self.scale = MLP(width, width, width, 2) if scaled_position else None
        if self.scale is not None:
            xavier(self.scale)
        self.layers = nn.ModuleList(
            DenseEncoderLayer(width, num_heads, ffn_width, dropout, activation) for _ in range(num_layers)
        )

    def forward(self, levels: list[Tensor], padding: Tensor) -> Memory:
        """levels: one map [B, C, H, W]. padding: [B, H, W] of the images."""
        if len(levels) != 1:
            raise ValueError(f"a dense encoder takes one level, got {len(levels)}: set model.num_levels=1")
        memory = flatten_levels(levels, padding, self.temperature, self.position_offset)
        tokens = memory.tokens
        for index, layer in enumerate(self.layers):
            position = memory.position if self.scale is None else memory.position * self.scale(tokens)
            tokens = recomputed(layer, tokens, position, memory.padding, when=index < self.checkpointed_layers)
        return replace(memory, tokens=tokens)


class DenseEncoderLayer(nn.Module):
    """Self-attention and feed-forward, post-norm."""

    def __init__(self, width: int, num_heads: int, ffn_width: int, dropout: float, activation: Activation) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, num_heads, dropout, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width)
        self.ffn = FFN(width, ffn_width, dropout, activation)

    def forward(self, tokens: Tensor, position: Tensor, padding: Tensor) -> Tensor:
        """tokens, position: [B, S, C]. padding: [B, S]. Returns [B, S, C]."""
        place = tokens + position
        attended, _ = self.attention(place, place, tokens, key_padding_mask=padding, need_weights=False)
        return self.ffn(self.norm(tokens + self.dropout(attended)))


def of_cells(embedding: Tensor, shapes: Shapes) -> Tensor:
    """[L, C] of levels -> [S, C] of all their cells. shapes: (height, width) per level."""
    return torch.cat([own.expand(height * width, -1) for own, (height, width) in zip(embedding, shapes, strict=True)])


def encoder_reference_points(memory: Memory) -> Tensor:
    """Each cell's centre, in the coordinates of every level: [B, S, L, 2]."""
    return cell_centres(memory)[:, :, None] * memory.valid_ratios[:, None]
