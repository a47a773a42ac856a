"""The hybrid branch: further proposals, matched one-to-many (H-DETR, Jia et al. 2023, sec. 3.2)."""

from __future__ import annotations

from torch import nn

from codetr.ops.gather import take
from codetr.queries.two_stage import ProposalEmbedding, best_tokens
from codetr.types import MAIN, Matching, QueryContext, QueryGroup


class HybridQueries(nn.Module):
    """The proposals that come next after the main group's, from the same first stage; dropped after training.

    Contents are learned. The projection of the positions is the branch's own, so that inference holds nothing of it
    (the original shares the main group's).

    repeats: every object is matched so many times.
    weight: of its losses.

    Raises ValueError when the main group has no class-agnostic first stage over all tokens.
    """

    def __init__(
        self, width: int, num_queries: int, embed_position: bool, temperature: float, repeats: int, weight: float
    ) -> None:
        super().__init__()
        self.num_queries, self.repeats, self.weight = num_queries, repeats, weight
        self.content = nn.Embedding(num_queries, width)
        self.embedding = ProposalEmbedding(width, temperature) if embed_position else None
        self.brings_reference = True

    def forward(self, context: QueryContext) -> QueryGroup:
        main = context.groups[MAIN]
        if main.proposals is None or not main.proposals.class_agnostic:
            raise ValueError("hybrid queries need the main group's proposals: two-stage queries, class_agnostic: true")
        every, taken = main.proposals.prediction, main.content.shape[1]
        order = best_tokens(every.logits, True, taken + self.num_queries)[:, taken:]
        reference = take(every.boxes, order).detach()
        position = self.embedding(reference)[0] if self.embedding is not None else None
        content = self.content.weight[: order.shape[1]].expand(len(order), -1, -1)
        return QueryGroup(content, reference, Matching(self.repeats), position, weight=self.weight)
