"""Queries from the encoder's best proposals (Deformable DETR, appendix A.4; DINO, sec. 3.4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from codetr.errors import UserError
from codetr.nn.boxes import inverse_sigmoid
from codetr.nn.class_rows import ClassRows, by_class
from codetr.nn.mlp import box_head, class_head
from codetr.nn.position import cell_centres, sine_reference
from codetr.ops.gather import largest, take
from codetr.ops.once import once
from codetr.types import Matching, Memory, Prediction, Proposals, QueryContext, QueryGroup, Shapes

BASE_SIZE = 0.05  # box side of a proposal on the finest level, as a share of the image; doubles per level


class ProposalEmbedding(nn.Module):
    """Positions and contents of queries from their boxes, once (Deformable DETR's two-stage form).

    With mixed selection the contents are learned and that half of the projection is unused, as in the original code.
    """

    def __init__(self, width: int, temperature: float) -> None:
        super().__init__()
        self.width, self.temperature = width, temperature
        self.projection = nn.Sequential(nn.Linear(2 * width, 2 * width), nn.LayerNorm(2 * width))

    def forward(self, reference: Tensor) -> tuple[Tensor, Tensor]:
        """reference: [B, N, 4]. Returns positions and contents, [B, N, C] each."""
        sine = sine_reference(reference, self.width // 2, self.temperature, "xywh")
        position, content = self.projection(sine).chunk(2, -1)
        return position, content


class TwoStageQueries(nn.Module):
    """The top proposals as references.

    num_classes: of the first-stage classifier.
    class_agnostic: it only tells object from background, by its first logit, and its loss is computed over all tokens
        (Deformable DETR); otherwise proposals are ranked by their best class and only the selected ones have a loss
        (DINO).
    mixed_selection: contents are learned (DINO, sec. 3.4); otherwise they come from the proposals, which needs
        embed_position.
    embed_position: positions from the proposals, computed once (Deformable DETR); otherwise the decoder derives them in
        every layer (DINO).
    repeats: every object is matched so many times.
    weight: of the group's losses.

    Raises UserError when the contents would come from nowhere.
    """

    def __init__(
        self,
        width: int,
        num_classes: int,
        num_queries: int,
        class_agnostic: bool,
        mixed_selection: bool,
        embed_position: bool,
        temperature: float,
        eps: float,
        repeats: int,
        weight: float,
    ) -> None:
        super().__init__()
        if not (mixed_selection or embed_position):
            raise UserError(
                "model.detector.main.mixed_selection=false: the contents then come from the proposals, which needs "
                "model/position@model.detector.decoder.query_position=given"
            )
        self.num_queries, self.class_agnostic, self.eps = num_queries, class_agnostic, eps
        self.repeats, self.weight = repeats, weight
        self.projection = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width))
        self.class_head = by_class(class_head(width, num_classes), ClassRows(agnostic=class_agnostic))
        self.box_head = box_head(width)
        self.content = nn.Embedding(num_queries, width) if mixed_selection else None
        self.embedding = ProposalEmbedding(width, temperature) if embed_position else None
        self.brings_reference = True

    def forward(self, context: QueryContext) -> QueryGroup:
        memory = context.memory
        anchors, legal = proposal_anchors(memory, self.eps)
        tokens = self.projection(memory.tokens.masked_fill(~legal[..., None], 0))
        logits = self.class_head(tokens)
        top = best_tokens(logits, self.class_agnostic, self.num_queries)
        boxes = (self.box_head(take(tokens, top)) + take(anchors, top)).sigmoid()
        selected = Prediction(take(logits, top), boxes)
        reference = selected.boxes.detach()
        position, content = self._embed(reference)
        targets = Matching(self.repeats)
        group = QueryGroup(content, reference, targets, position, weight=self.weight)
        if context.targets is not None:
            if self.class_agnostic:
                every = Prediction(logits, (self.box_head(tokens) + anchors).sigmoid())
                group.proposals = Proposals(every, targets, class_agnostic=True)
            else:
                group.proposals = Proposals(selected, targets)
        return group

    def _embed(self, reference: Tensor) -> tuple[Tensor | None, Tensor]:
        """Positions, or None, and contents of queries at `reference` [B, N, 4]."""
        position, content = (None, None) if self.embedding is None else self.embedding(reference)
        if self.content is not None:
            content = self.content.weight[: reference.shape[1]].expand(reference.shape[0], -1, -1)
        assert content is not None  # promised by __init__
        return position, content


def best_tokens(logits: Tensor, class_agnostic: bool, count: int) -> Tensor:
    """Indices [B, min(count, S)] of the best proposals, best first. logits: [B, S, K]."""
    scores = logits[..., 0] if class_agnostic else logits.amax(-1)
    return largest(scores, count)


def proposal_anchors(memory: Memory, eps: float) -> tuple[Tensor, Tensor]:
    """One box per token, centred on it: logits [B, S, 4] (the inverse sigmoid of cxcywh), and which are legal.

    A token is no proposal when it is padding or a coordinate of its box is outside (0.01, 0.99); after the sigmoid
    its box is then (1, 1, 1, 1), as in the original code.
    """
    centres = cell_centres(memory)
    boxes = torch.cat([centres, _sides(memory.spatial_shapes, centres.device).expand_as(centres)], -1)
    legal = ((boxes > 0.01) & (boxes < 0.99)).all(-1) & ~memory.padding
    far = torch.finfo(boxes.dtype).max
    return inverse_sigmoid(boxes, eps).masked_fill(~legal[..., None], far), legal


@once
def _sides(shapes: Shapes, device: torch.device) -> Tensor:
    """[S, 1] side of every token's box."""
    return torch.cat(
        [torch.full((h * w, 1), BASE_SIZE * 2**level, device=device) for level, (h, w) in enumerate(shapes)]
    )
