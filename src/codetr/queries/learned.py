"""Queries that are parameters (DETR; DAB-DETR, sec. 3.1)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from codetr.types import Matching, QueryContext, QueryGroup


class LearnedQueries(nn.Module):
    """The same queries for every image.

    content: `zeros` (DETR), one vector `shared` by all (DN-DETR: the label "unknown"), or a vector of each query's own
        (Deformable DETR).
    indicator: the last channel of the content is 0, since denoising queries have 1 there (DN-DETR, sec. 3.5).
    repeats: every object is matched so many times, the naive one-to-many assignment of Group DETR's figure 1.
    embed_position: each query owns a position, from which the decoder predicts a reference point (DETR, Conditional
        DETR, Deformable DETR); otherwise an anchor box, from which it derives positions (DAB-DETR).
    weight: of the group's losses.
    """

    def __init__(
        self,
        width: int,
        num_queries: int,
        content: Literal["zeros", "shared", "learned"],
        indicator: bool,
        repeats: int,
        embed_position: bool,
        weight: float,
    ) -> None:
        super().__init__()
        self.width, self.num_queries, self.indicator = width, num_queries, indicator
        self.repeats, self.weight = repeats, weight
        rows = {"zeros": 0, "shared": 1, "learned": num_queries}[content]
        self.content = nn.Embedding(rows, width - indicator) if rows else None
        self.position = nn.Embedding(num_queries, width) if embed_position else None
        self.anchors = None if embed_position else nn.Embedding(num_queries, 4)
        self.brings_reference = not embed_position

    def forward(self, context: QueryContext) -> QueryGroup:
        batch = len(context.memory.tokens)
        return QueryGroup(
            content=self._content(context.memory.tokens).expand(batch, self.num_queries, -1),
            reference=None if self.anchors is None else self.anchors.weight.sigmoid().expand(batch, -1, -1),
            targets=Matching(self.repeats),
            position=None if self.position is None else self.position.weight.expand(batch, -1, -1),
            weight=self.weight,
        )

    def _content(self, tokens: Tensor) -> Tensor:
        """[N, C] that are learned, or [1, C] zeros of the type and device of the memory's `tokens`."""
        if self.content is None:
            return torch.zeros(1, self.width, dtype=tokens.dtype, device=tokens.device)
        return pad(self.content.weight, (0, 1)) if self.indicator else self.content.weight
