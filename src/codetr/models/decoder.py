"""The decoder: one pass over the queries of all groups."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from codetr.nn.boxes import refine
from codetr.nn.deformable_attention import DeformableAttention
from codetr.nn.group_attention import Bucket, GroupSelfAttention, attention_plan
from codetr.nn.mlp import FFN, MLP, box_head, class_head
from codetr.nn.position import sine_reference
from codetr.types import Memory, Prediction, QueryGroup


class DeformableCrossAttention(nn.Module):
    """Deformable attention of the queries to the memory, around their references."""

    def __init__(self, width: int, num_heads: int, num_levels: int, num_points: int) -> None:
        super().__init__()
        self.attention = DeformableAttention(width, num_heads, num_levels, num_points)

    def forward(self, content: Tensor, position: Tensor, reference: Tensor, memory: Memory) -> Tensor:
        """content, position: [B, N, C]. reference: [B, N, 2 or 4], normalised to the unpadded image."""
        ratios = memory.valid_ratios[:, None]
        if reference.shape[-1] == 4:
            ratios = torch.cat([ratios, ratios], -1)
        return self.attention(content + position, reference[:, :, None] * ratios, memory)


class ReferencePosition(nn.Module):
    """Query positions from the current reference, recomputed for every layer (DAB-DETR, eq. 3; DINO)."""

    def __init__(self, width: int, temperature: float) -> None:
        super().__init__()
        self.features_per_coordinate, self.temperature = width // 2, temperature
        self.mlp = MLP(2 * width, width, width, 2)

    def forward(self, reference: Tensor, memory: Memory) -> Tensor:
        """reference: [B, N, 4] -> [B, N, C]."""
        finest = memory.valid_ratios[:, None, 0].repeat(1, 1, 2)
        sine = sine_reference(reference * finest, self.features_per_coordinate, self.temperature, "yxwh")
        return self.mlp(sine)


class DecoderLayer(nn.Module):
    """Self-attention per group, cross-attention, feed-forward; post-norm."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        ffn_width: int,
        dropout: float,
        cross_attention: Callable[[], nn.Module],
    ) -> None:
        super().__init__()
        self.self_attention = GroupSelfAttention(width, num_heads)
        self.norm1 = nn.LayerNorm(width)
        self.cross_attention = cross_attention()
        self.norm2 = nn.LayerNorm(width)
        self.ffn = FFN(width, ffn_width, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, content: Tensor, position: Tensor, reference: Tensor, memory: Memory, plan: list[Bucket]
    ) -> Tensor:
        content = self.norm1(content + self.dropout(self.self_attention(content, position, plan)))
        attended = self.cross_attention(content, position, reference, memory)
        return self.ffn(self.norm2(content + self.dropout(attended)))


class Decoder(nn.Module):
    """Runs all query groups together and refines their references layer by layer.

    layer: makes one decoder layer. query_position: derives query positions from the references in every layer;
    None when the groups bring their own. output_norm: predict from a shared LayerNorm of each layer's output,
    while references are refined from the output itself (DINO). look_forward_twice: the box loss of a layer also
    reaches the layer before (DINO, sec. 3.5). eps: of the inverse sigmoid. checkpointed_layers: the first n
    layers recompute their activations in the backward pass.
    """

    def __init__(
        self,
        width: int,
        num_classes: int,
        num_layers: int,
        layer: Callable[[], nn.Module],
        query_position: nn.Module | None,
        output_norm: bool,
        look_forward_twice: bool,
        eps: float,
        checkpointed_layers: int,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer() for _ in range(num_layers))
        self.class_heads = nn.ModuleList(class_head(width, num_classes) for _ in range(num_layers))
        self.box_heads = nn.ModuleList(box_head(width) for _ in range(num_layers))
        self.query_position = query_position
        self.norm = nn.LayerNorm(width) if output_norm else nn.Identity()
        self.look_forward_twice, self.eps = look_forward_twice, eps
        self.checkpointed_layers = checkpointed_layers

    def forward(self, groups: list[QueryGroup], memory: Memory) -> dict[str, Prediction]:
        """Returns per group its stacked predictions: logits [layers, B, N, K], boxes [layers, B, N, 4]."""
        content = torch.cat([group.content for group in groups], 1)
        reference = torch.cat([group.reference for group in groups], 1)
        given = None if self.query_position else torch.cat([_position(group) for group in groups], 1)
        plan = attention_plan(groups)
        logits, boxes, previous = [], [], reference
        for index, layer in enumerate(self.layers):
            position = self.query_position(reference, memory) if self.query_position else given
            if index < self.checkpointed_layers and torch.is_grad_enabled():
                content = checkpoint(layer, content, position, reference, memory, plan, use_reentrant=False)
            else:
                content = layer(content, position, reference, memory, plan)
            output = self.norm(content)
            logits.append(self.class_heads[index](output))
            delta = self.box_heads[index](output).float()
            boxes.append(refine(previous if self.look_forward_twice else reference, delta, self.eps))
            if output is not content:
                delta = self.box_heads[index](content).float()
            previous = refine(reference, delta, self.eps)
            reference = previous.detach()
        return _split(groups, Prediction(torch.stack(logits), torch.stack(boxes)))


def _position(group: QueryGroup) -> Tensor:
    if group.position is None:
        raise ValueError(f"query group {group.name!r} brings no position, and the decoder has no query_position")
    return group.position


def _split(groups: list[QueryGroup], prediction: Prediction) -> dict[str, Prediction]:
    sizes = [group.content.shape[1] for group in groups]
    logits, boxes = prediction.logits.split(sizes, 2), prediction.boxes.split(sizes, 2)
    return {group.name: Prediction(a, b) for group, a, b in zip(groups, logits, boxes, strict=True)}
