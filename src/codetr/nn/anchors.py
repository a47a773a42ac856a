"""Anchors on a pyramid (Faster R-CNN, sec. 3.1.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from codetr.types import Pyramid


class AnchorGrid(nn.Module):
    """The anchors of every cell: one per (ratio, scale), ratio-major.

    scales: side of a square anchor in strides.
    ratios: height / width at equal area.
    offset: position of a cell's centre in strides from its top-left corner (0: the corner itself).
    """

    half_sizes: Tensor

    def __init__(self, scales: Sequence[float], ratios: Sequence[float], offset: float = 0.0) -> None:
        super().__init__()
        self.offset = offset
        self.per_cell = len(scales) * len(ratios)
        root, side = torch.tensor(tuple(ratios)).sqrt()[:, None], torch.tensor(tuple(scales))
        half = torch.stack([side / root, side * root], -1).flatten(0, 1) / 2
        self.register_buffer("half_sizes", half, persistent=False)

    def forward(self, pyramid: Pyramid) -> list[Tensor]:
        """Anchors [H_j * W_j * A, 4] of each level, xyxy in network pixels, row by row, A per cell."""
        return [
            self._level(level.shape[-2:], stride) for level, stride in zip(pyramid.levels, pyramid.strides, strict=True)
        ]

    def _level(self, shape: Sequence[int], stride: int) -> Tensor:
        y, x = ((torch.arange(n, device=self.half_sizes.device) + self.offset) * stride for n in shape)
        centers = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1)[:, None]
        return torch.cat([centers - self.half_sizes * stride, centers + self.half_sizes * stride], -1).flatten(0, 1)

    def valid(self, pyramid: Pyramid, sizes: Tensor) -> Tensor:
        """[B, N] bool: anchors of all levels whose cell begins inside its image. sizes: [B, 2] (height, width)."""
        sizes = -(-sizes // pyramid.pad_divisor) * pyramid.pad_divisor
        parts = []
        for level, stride in zip(pyramid.levels, pyramid.strides, strict=True):
            y, x = (torch.arange(n, device=sizes.device) * stride for n in level.shape[-2:])
            inside = (y < sizes[:, :1])[:, :, None] & (x < sizes[:, 1:])[:, None, :]
            parts.append(inside.flatten(1).repeat_interleave(self.per_cell, 1))
        return torch.cat(parts, 1)
