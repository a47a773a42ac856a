"""The ViT of EVA-02 (Fang et al., arXiv 2303.11331) with window attention (ViTDet, Li et al., arXiv 2203.16527)."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import build_rotary_pos_embed, resample_abs_pos_embed
from timm.models.vision_transformer_sam import window_partition, window_unpartition
from torch import Tensor, nn

from codetr.errors import UserError
from codetr.models.backbone import Normalize, feature_network
from codetr.nn.recompute import recomputed

UNITS = 16  # positions per side of the image in pretraining; every rotary table spans as many


class ViT(nn.Module):
    """timm's EVA-02 for images of any size, as the detection code of EVA-02 and of Co-DETR computes it.

    Layers, weights and names are timm's, which lacks:
    - blocks that attend within windows; the window is what their rotary embedding spans.
    - a rotary embedding whose steps do not depend on the image's size (`rotary_canvas`).
    - a network without class token whose weights come from one with it. The first absolute position is the class
      token's and stays unused.

    The feature map has ceil(side / patch) cells; images are padded with zeros. Windows at the border are padded with
    zeros that take part in attention, as in training of the published weights.

    window: cells per side.
    global_blocks: indices of the blocks that attend to the whole map.
    rotary_canvas: image side in pixels that the rotary embedding of the global blocks spans, whatever the image's size;
        None: every image's own height and width. Both are the same for images of that size.
    checkpointed_blocks: the first n blocks recompute their activations in the backward pass.

    The others: see `codetr.models.backbone.Backbone`.

    Raises UserError when `name` is no EVA-02 of timm's, or lacks one of `global_blocks`.
    """

    def __init__(
        self,
        name: str,
        pretrained: bool | str,
        window: int,
        global_blocks: tuple[int, ...],
        rotary_canvas: int | None,
        checkpointed_blocks: int,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        arguments: dict[str, Any],
    ) -> None:
        if not name.startswith("eva02_"):
            raise UserError(f"model.backbone.name={name}: not an EVA-02 of timm's, which are named eva02_*")
        arguments = {**arguments, "dynamic_img_size": True, "dynamic_img_pad": True}
        super().__init__()
        network = feature_network(name, (-1,), pretrained, arguments)
        self.channels: tuple[int, ...] = tuple(network.feature_info.channels())
        self.strides: tuple[int, ...] = tuple(network.feature_info.reduction())
        eva: Any = network.model.to(memory_format=torch.channels_last)
        if not set(global_blocks) <= set(range(len(eva.blocks))):
            raise UserError(f"model.backbone.global_blocks={list(global_blocks)}: {name} has {len(eva.blocks)} blocks")
        self.window, self.rotary_canvas = window, rotary_canvas
        self.checkpointed_blocks = checkpointed_blocks
        self.patch_embed, self.pos_embed = eva.patch_embed, eva.pos_embed
        self.blocks = nn.ModuleList(
            Block(block, None if i in global_blocks else window) for i, block in enumerate(eva.blocks)
        )
        self.norm = nn.LayerNorm(self.channels[0])
        self.head_width: int = eva.blocks[0].attn.head_dim
        self.normalize = Normalize(mean, std)

    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.patch_embed(images.contiguous(memory_format=torch.channels_last))
        size = (x.shape[1], x.shape[2])
        position = resample_abs_pos_embed(self.pos_embed[:, 1:], list(size), num_prefix_tokens=0, antialias=False)
        x = x + position.unflatten(1, size)
        tables = self._rotary_tables(size, x.device)
        for i, block in enumerate(self.blocks):
            x = recomputed(block, x, *tables, when=i < self.checkpointed_blocks)
        return [self.norm(x).permute(0, 3, 1, 2)]

    def _rotary_tables(self, size: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
        """The rotary tables of a window and of the whole map."""
        window = (self.window, self.window)
        cells = None if self.rotary_canvas is None else self.rotary_canvas / self.strides[0]
        span = size if cells is None else (cells, cells)
        return (
            rotary_table(window, window, self.head_width, device),
            rotary_table(size, span, self.head_width, device),
        )


class Block(nn.Module):
    """Attention within windows, or with window=None in the whole map, and feed-forward layer of timm's `block`."""

    def __init__(self, block: Any, window: int | None) -> None:
        super().__init__()
        self.window = window
        block.attn.num_prefix_tokens = 0  # no class token: every token has a rotary embedding
        self.norm1, self.attn, self.drop_path1 = block.norm1, block.attn, block.drop_path1
        self.norm2, self.mlp, self.drop_path2 = block.norm2, block.mlp, block.drop_path2

    def forward(self, x: Tensor, window_rotary: Tensor, rotary: Tensor) -> Tensor:
        """x: [B, H, W, C]. window_rotary, rotary: of `rotary_table`, for a window and for the map."""
        attended = self._attend(self.norm1(x), rotary if self.window is None else window_rotary)
        x = x + self.drop_path1(attended)
        return x + self.drop_path2(self.mlp(self.norm2(x)))

    def _attend(self, x: Tensor, rotary: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        if self.window is None:
            return self.attn(x.flatten(1, 2), rotary).unflatten(1, (height, width))
        windows, padded = window_partition(x, self.window)
        return window_unpartition(self.attn(windows.flatten(1, 2), rotary), self.window, (height, width), padded)


def rotary_table(size: tuple[int, int], span: tuple[float, float], width: int, device: torch.device) -> Tensor:
    """[H * W, 2 * width], sines and cosines of the angles for heads of `width` channels, rows of the map first.

    Cell i is at position i / span * UNITS, per axis. The first half of the channels turns with the row, the second
    with the column; neighbouring channels turn together, pair k of K by position / 10000 ** (k / K) (RoFormer, Su et
    al., arXiv 2104.09864, eq. 15).
    """
    reference: Any = [UNITS * cells / spanned for cells, spanned in zip(size, span, strict=True)]
    table = build_rotary_pos_embed(list(size), dim=width, in_pixels=False, ref_feat_shape=reference, device=device)
    return torch.cat(table, dim=-1)
