"""Swin Transformer (Liu et al., ICCV 2021) with the windows of the detection code that it came with."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.layers import PatchEmbed
from timm.models.swin_transformer import (
    SwinTransformerBlock,
    SwinTransformerStage,
    window_partition,
    window_reverse,
)
from torch import Tensor, nn
from torch.nn import functional as F

from codetr.errors import UserError
from codetr.models.backbone import Normalize, feature_network, freeze_stages
from codetr.nn.recompute import recomputed


class Swin(nn.Module):
    """timm's Swin for images of any size, as the detection code of Swin and of Co-DETR computes it.

    Layers, weights and names are timm's, which lacks:
    - their order of padding and shifting: maps whose sides are no multiples of the window are padded first. timm
      shifts first, which gives other windows and other numbers.
    - a layer norm on every output.
    - one mask of the shifted windows for all blocks of a stage.

    Windows neither shrink nor stop to shift on small maps. Padding takes part in attention, as in training of the
    published weights. Images whose sides are no multiples of 4 are padded with zeros: level i has
    ceil(side / stride_i) cells.

    out_indices: stages 0..3 have strides 4..32.
    checkpointing: blocks recompute their activations (less memory, more time).

    The others: see `codetr.models.backbone.Backbone`.

    Raises UserError when `name` is no Swin of timm's.
    """

    def __init__(
        self,
        name: str,
        out_indices: tuple[int, ...],
        pretrained: bool | str,
        frozen_stages: int,
        checkpointing: bool,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        arguments: dict[str, Any],
    ) -> None:
        if not name.startswith("swin_"):
            raise UserError(f"model.backbone.name={name}: not a Swin of timm's, which are named swin_*")
        arguments = {
            **arguments,
            "strict_img_size": False,
            "always_partition": True,
            "embed_layer": partial(PatchEmbed, dynamic_img_pad=True),
        }
        super().__init__()
        body = feature_network(name, out_indices, pretrained, arguments)
        self.channels: tuple[int, ...] = tuple(body.feature_info.channels())
        self.strides: tuple[int, ...] = tuple(body.feature_info.reduction())
        self.body = body.to(memory_format=torch.channels_last)
        freeze_stages(self.body, frozen_stages)
        for child_name, child in self.body.named_children():
            if isinstance(child, SwinTransformerStage):
                self.body[child_name] = Stage(child, checkpointing)
        self.norms = nn.ModuleDict(
            {str(i): nn.LayerNorm(width) for i, width in zip(out_indices, self.channels, strict=True)}
        )
        self.normalize = Normalize(mean, std)

    def forward(self, images: Tensor) -> list[Tensor]:
        levels = self.body(images.contiguous(memory_format=torch.channels_last))
        return [norm(level).permute(0, 3, 1, 2) for norm, level in zip(self.norms.values(), levels, strict=True)]


class Stage(nn.Module):
    """Patch merging and blocks of timm's `stage`. Maps are [B, H, W, C]."""

    def __init__(self, stage: SwinTransformerStage, checkpointing: bool) -> None:
        super().__init__()
        blocks: Any = stage.blocks
        self.window: tuple[int, int] = blocks[0].window_size
        self.checkpointing = checkpointing
        self.downsample = stage.downsample
        self.blocks = nn.ModuleList(Block(block) for block in blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        mask = shift_mask(x, self.window)
        for block in self.blocks:
            x = recomputed(block, x, mask, when=self.checkpointing)
        return x


class Block(nn.Module):
    """Window attention and feed-forward layer of timm's `block`."""

    def __init__(self, block: SwinTransformerBlock) -> None:
        super().__init__()
        self.window: tuple[int, int] = block.window_size
        self.shift: tuple[int, int] = block.shift_size
        attention: Any = block.attn
        attention.fused_attn = True  # scaled_dot_product_attention, which timm leaves off by default
        self.norm1, self.attn, self.drop_path1 = block.norm1, attention, block.drop_path1
        self.norm2, self.mlp, self.drop_path2 = block.norm2, block.mlp, block.drop_path2

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x: [B, H, W, C]. mask: of `shift_mask`, for blocks that shift."""
        x = x + self.drop_path1(self._attend(self.norm1(x), mask))
        return x + self.drop_path2(self.mlp(self.norm2(x)))

    def _attend(self, x: Tensor, mask: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        shifts = any(self.shift)
        x = F.pad(x, (0, 0, 0, -width % self.window[1], 0, -height % self.window[0]))
        padded = x.shape[1:3]
        if shifts:
            x = x.roll((-self.shift[0], -self.shift[1]), (1, 2))
        windows = window_partition(x, self.window).flatten(1, 2)
        windows = self.attn(windows, mask if shifts else None)
        x = window_reverse(windows.unflatten(1, self.window), self.window, *padded)
        if shifts:
            x = x.roll(self.shift, (1, 2))
        return x[:, :height, :width]


def shift_mask(x: Tensor, window: tuple[int, int]) -> Tensor:
    """What is added to the attention in the windows of the map `x` [B, H, W, C], padded: [windows, N, N] of its type.

    -100 between cells that only the cyclic shift by half a window made neighbours, else 0 (paper, figure 4); -100 as
    in the training of the published weights.
    """
    regions = []
    for side, size in zip(x.shape[1:3], window, strict=True):
        cells = torch.arange(side + -side % size, device=x.device)
        regions.append((cells >= len(cells) - size).int() + (cells >= len(cells) - size // 2))
    region = 3 * regions[0][:, None] + regions[1]
    region = window_partition(region[None, :, :, None], window).flatten(1)
    return (region[:, None] != region[:, :, None]).to(x.dtype) * -100
