"""Queries that are parameters (DETR; DAB-DETR, sec. 3.1)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from codetr.errors import UserError
from codetr.types import Matching, QueryContext, QueryGroup


class LearnedQueries(nn.Module):
    """The same queries for every image.

    num_queries: in all, whatever the content.
    content: `zeros` (DETR), one vector `shared` by all (DN-DETR: the label "unknown"), `learned`: a vector of each
        query's own (Deformable DETR), or `patterns`: each place stands once for every pattern (Anchor DETR, sec. 3.3;
        the 900 queries of DAB-DETR are 300 anchors with 3 patterns).
    indicator: the last channel of the content is 0, since denoising queries have 1 there (DN-DETR, sec. 3.5).
    repeats: every object is matched so many times, the naive one-to-many assignment of Group DETR's figure 1.
    embed_position: each query owns a position, from which the decoder predicts a reference point (DETR, Conditional
        DETR, Deformable DETR); otherwise an anchor box, from which it derives positions (DAB-DETR).
    weight: of the group's losses.
    patterns: how many there are, where content is `patterns`; num_queries must be a multiple of it.
    """

    def __init__(
        self,
        width: int,
        num_queries: int,
        content: Literal["zeros", "shared", "learned", "patterns"],
        indicator: bool,
        repeats: int,
        embed_position: bool,
        weight: float,
        patterns: int = 1,
    ) -> None:
        super().__init__()
        self.width, self.num_queries, self.indicator = width, num_queries, indicator
        self.repeats, self.weight = repeats, weight
        rows = {"zeros": 0, "shared": 1, "learned": num_queries, "patterns": patterns}[content]
        self.patterns = patterns if content == "patterns" else 1
        if num_queries % self.patterns:
            raise UserError(f"model.detector.main: {num_queries} queries are not {patterns} patterns at every place")
        places = num_queries // self.patterns
        self.content = nn.Embedding(rows, width - indicator) if rows else None
        self.position = nn.Embedding(places, width) if embed_position else None
        self.anchors = None if embed_position else nn.Embedding(places, 4)
        self.brings_reference = not embed_position

    def forward(self, context: QueryContext) -> QueryGroup:
        batch = context.memory.tokens.shape[0]
        return QueryGroup(
            content=self._content(context.memory.tokens).expand(batch, self.num_queries, -1),
            reference=None if self.anchors is None else self._at_places(self.anchors.weight.sigmoid(), batch),
            targets=Matching(self.repeats),
            position=None if self.position is None else self._at_places(self.position.weight, batch),
            weight=self.weight,
        )

    def _at_places(self, x: Tensor, batch: int) -> Tensor:
        """Of every place, once for each pattern: [places, D] -> [B, N, D]."""
        return x.repeat(self.patterns, 1).expand(batch, -1, -1)

    def _content(self, tokens: Tensor) -> Tensor:
        """[1 or N, C], of the tokens' kind and device. All places of a pattern stand together."""
        if self.content is None:
            return torch.zeros(1, self.width, dtype=tokens.dtype, device=tokens.device)
        content = pad(self.content.weight, (0, 1)) if self.indicator else self.content.weight
        return content.repeat_interleave(self.num_queries // self.patterns, 0) if self.patterns > 1 else content
