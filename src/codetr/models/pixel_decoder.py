"""The encoder of Mask2Former: deformable attention over three levels, and a finer map of which masks are made."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from codetr.models.encoder import DeformableEncoder, of_cells
from codetr.nn.position import sine_position
from codetr.types import Memory, Pixels


class PixelDecoder(DeformableEncoder):
    """Mask2Former's pixel decoder (Cheng et al. 2022, sec. 3.2.1 and appendix A).

    The finest level stays out of the attention: what the next one became is upsampled and added, and a convolution
    makes the embeddings of the pixels. The memory's tokens are marked with an embedding of their level, and its
    positions are the sine encoding alone.

    num_levels: that it takes, the finest among them.
    stride: of the finest level, in network pixels per cell.
    mask_width: E, of the embeddings of pixels.
    num_groups: of the group norm.

    The others: see DeformableEncoder.
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
        stride: int,
        mask_width: int,
        num_groups: int,
    ) -> None:
        super().__init__(
            width,
            num_heads,
            num_levels - 1,
            num_points,
            ffn_width,
            num_layers,
            dropout,
            temperature,
            position_offset,
            checkpointed_layers,
        )
        self.num_levels, self.stride, self.mask_width = num_levels, stride, mask_width
        self.scale_embedding = nn.Parameter(torch.randn(num_levels - 1, width))
        convolution, self.pixels = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.Conv2d(width, mask_width, 1)
        for layer in (convolution, self.pixels):
            nn.init.kaiming_uniform_(layer.weight, a=1)
        assert self.pixels.bias is not None
        nn.init.zeros_(self.pixels.bias)
        self.join = nn.Sequential(convolution, nn.GroupNorm(num_groups, width), nn.ReLU(inplace=True))

    def forward(self, levels: list[Tensor], padding: Tensor) -> Memory:
        """levels: [B, C, H_l, W_l], finest first. padding: [B, H, W] of the images."""
        finest, *coarser = levels
        memory = super().forward(coarser, padding)
        next_one = memory.levels()[0]
        maps = self.pixels(self.join(finest + _resized(next_one, (finest.shape[2], finest.shape[3]))))
        with torch.no_grad():  # linear, like the product with a query: a mask of any level without one of the finest
            resized = [_resized(maps, shape).flatten(2) for shape in memory.spatial_shapes]
        shapes, width = memory.spatial_shapes, memory.tokens.shape[2]
        position = sine_position(shapes, memory.valid_sizes, width, self.temperature, self.position_offset)
        return replace(
            memory,
            tokens=memory.tokens + of_cells(self.scale_embedding, shapes),
            position=position.to(memory.tokens.dtype),
            pixels=Pixels(maps, self.stride, torch.cat(resized, 2).transpose(1, 2)),
        )


def _resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return interpolate(maps, size, mode="bilinear", align_corners=False)
