"""The decoder: one pass over the queries of all groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from codetr.models.query_position import Placement
from codetr.nn.boxes import refine
from codetr.nn.group_attention import AttentionPlan, GroupSelfAttention, attention_plan
from codetr.nn.mlp import FFN, Activation, box_head, class_head, xavier
from codetr.nn.recompute import recomputed
from codetr.types import MAIN, Memory, Prediction, QueryGroup

Update = Literal["keep", "refine", "look_forward_twice"]


class DecoderLayer(nn.Module):
    """Self-attention per group, cross-attention, feed-forward; post-norm."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        ffn_width: int,
        dropout: float,
        activation: Activation,
        separate_position: bool,
        cross_attention: Callable[[], nn.Module],
    ) -> None:
        super().__init__()
        self.self_attention = GroupSelfAttention(width, num_heads, dropout, separate_position)
        self.norm1 = nn.LayerNorm(width)
        self.cross_attention = cross_attention()
        self.norm2 = nn.LayerNorm(width)
        self.ffn = FFN(width, ffn_width, dropout, activation)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, content: Tensor, placement: Placement, reference: Tensor, memory: Memory, plan: AttentionPlan
    ) -> Tensor:
        content = self.norm1(content + self.dropout(self.self_attention(content, placement.position, plan)))
        attended = self.cross_attention(content, placement, reference, memory)
        return self.ffn(self.norm2(content + self.dropout(attended)))


class Decoder(nn.Module):
    """Runs all query groups together.

    layer: makes one decoder layer.
    query_position: the position rule.
    reference_head: predicts the initial points of groups that bring positions only.
    update: what becomes of the references after a layer: `keep` them, `refine` them (Deformable DETR, appendix A.4), or
        refine them so that the box loss of a layer also reaches the layer before (`look_forward_twice`: DINO, sec. 3.5;
        DAB-DETR's code does it too).
    shared_heads: the layers share one classifier and one box regressor.
    output_norm: predict from a shared LayerNorm of each layer's output, while references are refined from the output
        itself.
    size_bias: logit of the first width and height, where references are points.
    eps: of the inverse sigmoid.
    checkpointed_layers: the first n layers recompute their activations in the backward pass.
    """

    def __init__(
        self,
        width: int,
        num_classes: int,
        num_layers: int,
        layer: Callable[[], nn.Module],
        query_position: nn.Module,
        reference_head: nn.Module | None,
        update: Update,
        shared_heads: bool,
        output_norm: bool,
        size_bias: float,
        eps: float,
        checkpointed_layers: int,
    ) -> None:
        super().__init__()
        num_heads = 1 if shared_heads else num_layers
        self.layers = nn.ModuleList(layer() for _ in range(num_layers))
        self.class_heads = nn.ModuleList(class_head(width, num_classes) for _ in range(num_heads))
        self.box_heads = nn.ModuleList(box_head(width) for _ in range(num_heads))
        nn.init.constant_(self.box_heads[0][-1].bias[2:], size_bias)  # type: ignore[index]
        self.query_position, self.reference_head = query_position, reference_head
        if reference_head is not None:
            xavier(reference_head)
        self.norm = nn.LayerNorm(width) if output_norm else nn.Identity()
        self.update, self.eps = update, eps
        self.checkpointed_layers = checkpointed_layers

    def forward(self, groups: dict[str, QueryGroup], memory: Memory) -> dict[str, Prediction]:
        """Returns per group its stacked predictions: logits [layers, B, N, K], boxes [layers, B, N, 4].

        References are points for all groups if they are for the main one.
        """
        content = torch.cat([group.content for group in groups.values()], 1)
        given = self._positions(groups)
        reference = self._references(groups)
        plan = attention_plan(groups)
        logits, boxes, previous = [], [], reference
        for index, layer in enumerate(self.layers):
            placement = self.query_position(index, content, reference, given, memory)
            when = index < self.checkpointed_layers
            content = recomputed(layer, content, placement, reference, memory, plan, when=when)
            output = self.norm(content)
            logits.append(self.class_heads[index % len(self.class_heads)](output))
            delta = self._delta(index, output)
            boxes.append(refine(previous, delta, self.eps))
            if self.update == "look_forward_twice":
                delta = delta if output is content else self._delta(index, content)
                previous = refine(reference, delta, self.eps)
                reference = previous.detach()
            elif self.update == "refine":
                previous = reference = boxes[-1].detach()
        return _split(groups, Prediction(torch.stack(logits), torch.stack(boxes)))

    def _delta(self, index: int, output: Tensor) -> Tensor:
        return self.box_heads[index % len(self.box_heads)](output)

    def _positions(self, groups: dict[str, QueryGroup]) -> Tensor | None:
        positions = [group.position for group in groups.values() if group.position is not None]
        if len(positions) not in (0, len(groups)):
            silent = [name for name, group in groups.items() if group.position is None]
            raise ValueError(f"query groups {silent} bring no position, but the others do")
        return torch.cat(positions, 1) if positions else None

    def _references(self, groups: dict[str, QueryGroup]) -> Tensor:
        references = {name: self.reference(name, group) for name, group in groups.items()}
        size = references[MAIN].shape[-1]
        for name, reference in references.items():
            if reference.shape[-1] < size:
                raise ValueError(f"query group {name!r} refers to points, but the main group to boxes")
        return torch.cat([reference[..., :size] for reference in references.values()], 1)

    def reference(self, name: str, group: QueryGroup) -> Tensor:
        """Where the queries of a group start, points or boxes: [B, N, 2 or 4]. name: of the group, for messages."""
        if group.reference is not None:
            return group.reference
        if self.reference_head is None or group.position is None:
            raise ValueError(f"query group {name!r} brings no reference, and the decoder cannot predict it")
        return self.reference_head(group.position).sigmoid()


def _split(groups: dict[str, QueryGroup], prediction: Prediction) -> dict[str, Prediction]:
    sizes = [group.content.shape[1] for group in groups.values()]
    logits, boxes = prediction.logits.split(sizes, 2), prediction.boxes.split(sizes, 2)
    return {name: Prediction(a, b) for name, a, b in zip(groups, logits, boxes, strict=True)}
