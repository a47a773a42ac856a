"""Anchors on a pyramid (Faster R-CNN, sec. 3.1.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from codetr.ops.once import once
from codetr.types import Pyramid, Shapes


class AnchorGrid:
    """The anchors of every cell: one per (ratio, scale), ratio-major.

    scales: side of a square anchor in strides.
    ratios: height / width at equal area.
    offset: position of a cell's centre in strides from its top-left corner (0: the corner itself).
    """

    def __init__(self, scales: Sequence[float], ratios: Sequence[float], offset: float = 0.0) -> None:
        self.scales, self.ratios, self.offset = tuple(scales), tuple(ratios), offset
        self.per_cell = len(self.scales) * len(self.ratios)

    def __call__(self, pyramid: Pyramid) -> list[Tensor]:
        """Anchors [H_j * W_j * A, 4] of each level, xyxy in network pixels, row by row, A per cell."""
        return [
            _anchors(self.scales, self.ratios, self.offset, shape, stride, pyramid.device)
            for shape, stride in zip(pyramid.shapes, pyramid.strides, strict=True)
        ]

    def every(self, pyramid: Pyramid) -> Tensor:
        """Those of all levels, [N, 4]."""
        return _every(self.scales, self.ratios, self.offset, pyramid.shapes, pyramid.strides, pyramid.device)

    def valid(self, pyramid: Pyramid, sizes: Tensor) -> Tensor:
        """[B, N] bool: anchors of all levels whose cell begins inside its image. sizes: [B, 2] (height, width)."""
        sizes = -(-sizes // pyramid.pad_divisor) * pyramid.pad_divisor
        corners = _corners(pyramid.shapes, pyramid.strides, self.per_cell, pyramid.device)
        return (corners < sizes[:, None]).all(-1)


@once
def _anchors(
    scales: tuple[float, ...],
    ratios: tuple[float, ...],
    offset: float,
    shape: tuple[int, int],
    stride: int,
    device: torch.device,
) -> Tensor:
    """Of one level."""
    root, side = torch.tensor(ratios).sqrt()[:, None], torch.tensor(scales)
    half = (torch.stack([side / root, side * root], -1).flatten(0, 1) / 2 * stride).to(device, non_blocking=True)
    y, x = ((torch.arange(n, device=device) + offset) * stride for n in shape)
    centers = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1)[:, None]
    return torch.cat([centers - half, centers + half], -1).flatten(0, 1)


@once
def _every(
    scales: tuple[float, ...],
    ratios: tuple[float, ...],
    offset: float,
    shapes: Shapes,
    strides: tuple[int, ...],
    device: torch.device,
) -> Tensor:
    levels = zip(shapes, strides, strict=True)
    return torch.cat([_anchors(scales, ratios, offset, shape, stride, device) for shape, stride in levels])


@once
def _corners(shapes: Shapes, strides: tuple[int, ...], per_cell: int, device: torch.device) -> Tensor:
    """[N, 2] (y, x) pixels at which the cell of every anchor begins."""
    parts = []
    for shape, stride in zip(shapes, strides, strict=True):
        y, x = (torch.arange(n, device=device) * stride for n in shape)
        parts.append(torch.stack(torch.meshgrid(y, x, indexing="ij"), -1).flatten(0, 1))
    return torch.cat(parts).repeat_interleave(per_cell, 0)
