"""The decoder: one pass over the queries of all groups."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal, Protocol

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
    """Self-attention per group, cross-attention, feed-forward; post-norm.

    cross_first: cross-attention comes before self-attention (Mask2Former, sec. 3.2.2).
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        ffn_width: int,
        dropout: float,
        activation: Activation,
        separate_position: bool,
        cross_attention: Callable[[], nn.Module],
        cross_first: bool = False,
    ) -> None:
        super().__init__()
        self.cross_first = cross_first
        self.self_attention = GroupSelfAttention(width, num_heads, dropout, separate_position)
        self.norm1 = nn.LayerNorm(width)
        self.cross_attention = cross_attention()
        self.norm2 = nn.LayerNorm(width)
        self.ffn = FFN(width, ffn_width, dropout, activation)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, content: Tensor, placement: Placement, reference: Tensor, memory: Memory, plan: AttentionPlan
    ) -> Tensor:
        if self.cross_first:
            content = self._cross(content, placement, reference, memory)
        content = self.norm1(content + self.dropout(self.self_attention(content, placement.position, plan)))
        if not self.cross_first:
            content = self._cross(content, placement, reference, memory)
        return self.ffn(content)

    def _cross(self, content: Tensor, placement: Placement, reference: Tensor, memory: Memory) -> Tensor:
        return self.norm2(content + self.dropout(self.cross_attention(content, placement, reference, memory)))


class Course(Protocol):
    """The way of all queries through the layers. reference: where they look in the next one."""

    reference: Tensor

    def step(self, index: int, content: Tensor) -> None:
        """Predict from what layer `index` gave, [B, N, C], and set the reference of the next one."""
        ...

    def prediction(self) -> Prediction:
        """What was predicted, stacked: [layers, B, N, ...]."""
        ...


class GroupDecoder(nn.Module, ABC):
    """One pass over the queries of all groups together. What is predicted, and where queries look, the course says."""

    layers: nn.ModuleList
    query_position: nn.Module
    checkpointed_layers: int
    predicts_masks: bool

    @abstractmethod
    def course(self, groups: dict[str, QueryGroup], content: Tensor, memory: Memory) -> Course:
        """content: [B, N, C] of all groups, one after the other, as they are before the first layer."""

    def forward(self, groups: dict[str, QueryGroup], memory: Memory) -> dict[str, Prediction]:
        """Returns per group its stacked predictions, [layers, B, N, ...]."""
        content = torch.cat([group.content for group in groups.values()], 1)
        given = self._positions(groups)
        course, plan = self.course(groups, content, memory), attention_plan(groups)
        for index, layer in enumerate(self.layers):
            placement = self.query_position(index, content, course.reference, given, memory)
            when = index < self.checkpointed_layers
            content = recomputed(layer, content, placement, course.reference, memory, plan, when=when)
            course.step(index, content)
        parts = course.prediction().split([group.content.shape[1] for group in groups.values()], 2)
        return dict(zip(groups, parts, strict=True))

    def _positions(self, groups: dict[str, QueryGroup]) -> Tensor | None:
        positions = [group.position for group in groups.values() if group.position is not None]
        if len(positions) not in (0, len(groups)):
            silent = [name for name, group in groups.items() if group.position is None]
            raise ValueError(f"query groups {silent} bring no position, but the others do")
        return torch.cat(positions, 1) if positions else None


class Decoder(GroupDecoder):
    """Predicts classes and boxes. References are points for all groups if they are for the main one.

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

    predicts_masks = False

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

    def course(self, groups: dict[str, QueryGroup], content: Tensor, memory: Memory) -> Course:
        return _BoxCourse(self, self._references(groups))

    def delta(self, index: int, output: Tensor) -> Tensor:
        """Of the boxes, [B, N, 4], from what layer `index` gave."""
        return self.box_heads[index % len(self.box_heads)](output)

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


class _BoxCourse:
    """Queries look around their boxes, which every layer moves."""

    def __init__(self, decoder: Decoder, reference: Tensor) -> None:
        self.decoder, self.reference, self.previous = decoder, reference, reference
        self.logits: list[Tensor] = []
        self.boxes: list[Tensor] = []

    def step(self, index: int, content: Tensor) -> None:
        decoder, output = self.decoder, self.decoder.norm(content)
        self.logits.append(decoder.class_heads[index % len(decoder.class_heads)](output))
        delta = decoder.delta(index, output)
        self.boxes.append(refine(self.previous, delta, decoder.eps))
        if decoder.update == "look_forward_twice":
            delta = delta if output is content else decoder.delta(index, content)
            self.previous = refine(self.reference, delta, decoder.eps)
            self.reference = self.previous.detach()
        elif decoder.update == "refine":
            self.previous = self.reference = self.boxes[-1].detach()

    def prediction(self) -> Prediction:
        return Prediction(torch.stack(self.logits), torch.stack(self.boxes))
