"""Masks at points, and the points at which a mask teaches most (PointRend, Kirillov et al. 2020, sec. 3.1)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import grid_sample


def at_points(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear values of maps [n, C, h, w] at points [n, P, 2], (x, y) as shares of the map: [n, C, P]."""
    return grid_sample(maps, 2 * points[:, :, None] - 1, align_corners=False)[..., 0]


def objects_at_points(masks: Tensor, objects: Tensor, points: Tensor) -> Tensor:
    """Bilinear values of objects' masks, as `at_points`, zero beyond them: [B, R, P] in 0..1.

    masks: [B, M, H, W] bool; only the four pixels around each point are read, and no copy of floats is made.
    objects: [B, R], which mask.
    points: [B, R, P, 2], (x, y) in pixels.
    """
    batch, count, height, width = masks.shape
    image = torch.arange(batch, device=masks.device)[:, None]
    first = ((image * count + objects) * height)[..., None]  # row of the mask among the rows of all
    pixels = masks.flatten()
    x, y = (points - 0.5).unbind(-1)
    left, top = x.floor(), y.floor()
    value = torch.zeros_like(x)
    for across, down in itertools.product((0, 1), (0, 1)):
        column, row = left + across, top + down
        share = (1 - (x - column).abs()) * (1 - (y - row).abs())
        there = (column >= 0) & (column < width) & (row >= 0) & (row < height)
        places = (first + row.clamp(0, height - 1).long()) * width + column.clamp(0, width - 1).long()
        value += share * (pixels[places] & there)
    return value


@dataclass(frozen=True)
class UncertainPoints:
    """Points of each mask, of which most are where the prediction is least certain.

    count: of points. oversample: so many times as many are drawn to choose from. share: of the chosen ones among all;
    the others are anywhere.
    """

    count: int
    oversample: float
    share: float

    @torch.no_grad()
    def __call__(self, logits: Tensor) -> Tensor:
        """logits: [n, h, w]. Returns [n, count, 2], (x, y) as shares of the map."""
        chosen = int(self.share * self.count)
        drawn = torch.rand(len(logits), int(self.count * self.oversample), 2, device=logits.device)
        doubt = -at_points(logits[:, None], drawn)[:, 0].abs()
        best = doubt.topk(chosen, dim=1).indices[..., None].expand(-1, -1, 2)
        anywhere = torch.rand(len(logits), self.count - chosen, 2, device=logits.device)
        return torch.cat([drawn.gather(1, best), anywhere], 1)
