"""Customised positive queries from an auxiliary head (Co-DETR, sec. 3.3, eq. 4)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert

from codetr.assign.sampling import sample
from codetr.nn.position import sine_reference
from codetr.ops.gather import take
from codetr.types import Known, Positives, QueryContext, QueryGroup, box_scale


class CollaborativeQueries(nn.Module):
    """One group of queries at the positive coordinates of the head named `head`.

    All images get as many queries as the image with most positives has, at least `min_queries` and at most
    `max_queries`; what an image lacks is filled with the head's negatives as background (`fill: negatives`, the
    official code) or stays empty (`fill: none`, the paper).

    static: the group has `max_queries` places whatever it holds, and the host need not know how many are taken.
    use_features: add the head's features at these places.
    embed_position: positions from the coordinates, computed once; otherwise the decoder derives them in every layer.
    weight: lambda_1 of eq. 6.
    """

    def __init__(
        self,
        head: str,
        width: int,
        min_queries: int,
        max_queries: int,
        fill: Literal["negatives", "none"],
        use_features: bool,
        embed_position: bool,
        temperature: float,
        eps: float,
        weight: float,
        static: bool = False,
    ) -> None:
        super().__init__()
        self.head, self.min_queries, self.max_queries = head, min_queries, max_queries
        self.fill, self.weight, self.static = fill, weight, static
        self.temperature, self.eps = temperature, eps
        self.width = width
        self.brings_reference = True
        out = 2 * width if embed_position else width
        self.coordinates = nn.Sequential(nn.Linear(2 * width, out), nn.LayerNorm(out))
        self.features = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width)) if use_features else None
        self.head_embedding = nn.Parameter(torch.zeros(1)) if embed_position else None  # a scalar, officially

    def forward(self, context: QueryContext) -> QueryGroup:
        assert context.targets is not None
        positives = context.positives[self.head]
        chosen, valid = self._choose(positives)
        scale = box_scale(context.targets.frames.sizes)[:, None]
        boxes = box_convert(take(positives.boxes_xyxy, chosen) / scale, "xyxy", "cxcywh")
        target_boxes = box_convert(take(positives.target_boxes_xyxy, chosen) / scale, "xyxy", "cxcywh")
        labels = positives.labels.gather(1, chosen).masked_fill(~valid, -1)
        content, position = self._embed(boxes, take(positives.features, chosen))
        objects = None if positives.objects is None else positives.objects.gather(1, chosen)
        targets = Known(labels, target_boxes, objects)
        return QueryGroup(content, boxes, targets, position, valid, weight=self.weight)

    def _choose(self, positives: Positives) -> tuple[Tensor, Tensor]:
        """Indices [B, n] of the candidates that become queries, and which of them are real."""
        candidates = positives.positive.shape[1]
        wanted = positives.positive.sum(1).max().clamp(self.min_queries, self.max_queries).clamp(max=candidates)
        places = min(self.max_queries, candidates) if self.static else int(wanted)
        keep = sample(positives.positive, places)
        if self.fill == "negatives":
            keep = keep | sample(positives.negative, (wanted - keep.sum(1)).clamp(min=0))
        order = keep.int() * 2 + (keep & positives.positive).int()  # positives first, then their filling
        chosen = order.topk(places, dim=1).indices
        return chosen, keep.gather(1, chosen)

    def _embed(self, boxes: Tensor, features: Tensor) -> tuple[Tensor, Tensor | None]:
        inside = boxes.clamp(self.eps, 1 - self.eps)  # anchors may stick out of the image; only their embedding is cut
        sine = sine_reference(inside, self.width // 2, self.temperature, "xywh")
        position, content = None, self.coordinates(sine.to(next(self.coordinates.parameters()).dtype))
        if self.head_embedding is not None:
            position, content = content.chunk(2, -1)
            position = position + self.head_embedding
        if self.features is not None:
            content = content + self.features(features)
        return content, position
