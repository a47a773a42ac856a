"""The second stage of Faster R-CNN: features of regions, their classes and boxes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from codetr.heads.common import init_normal, tower
from codetr.nn.class_rows import ClassRows, by_class
from codetr.ops.roi_align import roi_align_pyramid
from codetr.types import Pyramid


class RoIPool(nn.Module):
    """RoIAlign (Mask R-CNN) of every box on the level that fits its size (FPN, eq. 1); the coarsest is not used.

    size: cells per side of the result.
    finest_cells: boxes of less than twice this side, in cells of the finest level, are read from that level.
    sampling_ratio: samples per cell and axis, 0: as many as the pixels beneath.
    """

    def __init__(self, size: int, finest_cells: float, sampling_ratio: int) -> None:
        super().__init__()
        self.size, self.finest_cells, self.sampling_ratio = size, finest_cells, sampling_ratio

    def levels(self, boxes: Tensor, strides: tuple[int, ...]) -> Tensor:
        """[..., 4] xyxy -> [...] level of each box among those of `strides`."""
        side = (boxes[..., 2:] - boxes[..., :2]).prod(-1).clamp(min=0).sqrt()
        level = (side / (self.finest_cells * strides[0]) + 1e-6).log2().floor()
        return level.clamp(0, len(strides) - 1).long()

    def forward(self, pyramid: Pyramid, boxes: Tensor, valid: Tensor) -> Tensor:
        """boxes: [B, R, 4] xyxy in pixels. valid: [B, R]. Returns [B, R, C, size, size], 0 where not valid."""
        images = torch.arange(len(boxes), device=boxes.device)[:, None].expand(valid.shape)
        levels = self.levels(boxes, pyramid.strides[:-1]).where(valid, -1)
        return self._pool(pyramid, images.flatten(), boxes.flatten(0, 1), levels.flatten()).unflatten(0, valid.shape)

    def regions(self, pyramid: Pyramid, images: Tensor, boxes: Tensor) -> Tensor:
        """images: [R], the image of each box. boxes: [R, 4] xyxy in pixels. Returns [R, C, size, size]."""
        return self._pool(pyramid, images, boxes, self.levels(boxes, pyramid.strides[:-1]))

    def _pool(self, pyramid: Pyramid, images: Tensor, boxes: Tensor, level_of: Tensor) -> Tensor:
        maps, strides = pyramid.levels[: len(pyramid.strides) - 1], pyramid.strides[:-1]
        return roi_align_pyramid(maps, strides, images, boxes, level_of, self.size, self.sampling_ratio)


class BoxHead(nn.Module):
    """Convolutions, hidden layers, then class logits with background last, and box deltas.

    num_convs: 3x3 convolutions with group norms of `num_groups`, before the hidden layers.
    class_agnostic: one delta for all classes.
    """

    def __init__(
        self,
        width: int,
        size: int,
        num_convs: int,
        num_groups: int,
        num_hidden: int,
        hidden_width: int,
        num_classes: int,
        class_agnostic: bool,
    ) -> None:
        super().__init__()
        self.convs = tower(width, num_convs, num_groups)
        sizes = [width * size * size] + [hidden_width] * num_hidden
        layers = [m for i in range(num_hidden) for m in (nn.Linear(sizes[i], sizes[i + 1]), nn.ReLU(True))]
        self.hidden = nn.Sequential(nn.Flatten(), *layers)
        self.classes = by_class(nn.Linear(hidden_width, num_classes + 1), ClassRows(rest=1))
        self.deltas = nn.Linear(hidden_width, 4 if class_agnostic else num_classes * 4)
        if not class_agnostic:
            by_class(self.deltas, ClassRows(per_class=4))
        for layer in self.hidden:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        init_normal(self.classes, 0.01)
        init_normal(self.deltas, 0.001)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """[B, R, C, size, size] -> logits [B, R, K + 1], deltas [B, R, K or 1, 4], float32."""
        x = self.hidden(self.convs(pooled.flatten(0, 1))).unflatten(0, pooled.shape[:2])
        return self.classes(x).float(), self.deltas(x).unflatten(-1, (-1, 4)).float()
