"""Queries from the encoder's best proposals (Deformable DETR, appendix A.4; DINO, sec. 3.4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from codetr.nn.boxes import inverse_sigmoid
from codetr.nn.mlp import box_head, class_head
from codetr.nn.position import cell_centres, sine_reference
from codetr.ops.gather import take
from codetr.types import Matching, Memory, Prediction, Proposals, QueryContext, QueryGroup

BASE_SIZE = 0.05  # box side of a proposal on the finest level, as a share of the image; doubles per level


class TwoStageQueries(nn.Module):
    """The main group: top proposals as references, a learned embedding as content (mixed selection).

    num_classes: of the first-stage classifier. class_agnostic: it only tells object from background, by its first
    logit, and its loss is computed over all tokens (Deformable DETR); otherwise proposals are ranked by their best
    class and only the selected ones have a loss (DINO). embed_position: positions from the proposals' sine
    encoding, computed once (Deformable-DETR++; the half of the embedding that was the content without mixed
    selection is unused); otherwise the decoder derives them in every layer (DINO).
    """

    training_only = False

    def __init__(
        self,
        width: int,
        num_classes: int,
        num_queries: int,
        class_agnostic: bool,
        embed_position: bool,
        temperature: float,
        eps: float,
    ) -> None:
        super().__init__()
        self.num_queries, self.class_agnostic = num_queries, class_agnostic
        self.temperature, self.eps = temperature, eps
        self.projection = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width))
        self.class_head = class_head(width, num_classes)
        self.box_head = box_head(width)
        self.content = nn.Embedding(num_queries, width)
        both = 2 * width
        self.coordinates = nn.Sequential(nn.Linear(both, both), nn.LayerNorm(both)) if embed_position else None

    def forward(self, context: QueryContext) -> list[QueryGroup]:
        memory = context.memory
        anchors, legal = proposal_anchors(memory, self.eps)
        tokens = self.projection(memory.tokens.masked_fill(~legal[..., None], 0))
        logits = self.class_head(tokens)
        scores = logits[..., 0] if self.class_agnostic else logits.amax(-1)
        top = scores.topk(min(self.num_queries, scores.shape[1]), dim=1).indices
        selected = Prediction(
            take(logits, top), (self.box_head(take(tokens, top)).float() + take(anchors, top)).sigmoid()
        )
        reference = selected.boxes.detach()
        group = QueryGroup(
            name="main",
            content=self.content.weight[: top.shape[1]].expand(len(top), -1, -1),
            reference=reference,
            targets=Matching(),
            position=self._embed(reference),
        )
        if context.targets is not None:
            if self.class_agnostic:
                every = Prediction(logits, (self.box_head(tokens).float() + anchors).sigmoid())
                group.proposals = Proposals(every, class_agnostic=True)
            else:
                group.proposals = Proposals(selected)
        return [group]

    def _embed(self, reference: Tensor) -> Tensor | None:
        if self.coordinates is None:
            return None
        width = self.content.embedding_dim
        sine = sine_reference(reference, width // 2, self.temperature, "xywh")
        return self.coordinates(sine)[..., :width]


def proposal_anchors(memory: Memory, eps: float) -> tuple[Tensor, Tensor]:
    """One box per token, centred on it: logits [B, S, 4] (the inverse sigmoid of cxcywh), and which are legal.

    A token is no proposal when it is padding or a coordinate of its box is outside (0.01, 0.99); after the sigmoid
    its box is then (1, 1, 1, 1), as in the original code.
    """
    sides = [
        torch.full((h * w, 2), BASE_SIZE * 2**level, device=memory.padding.device)
        for level, (h, w) in enumerate(memory.spatial_shapes)
    ]
    centres = cell_centres(memory)
    boxes = torch.cat([centres, torch.cat(sides).expand_as(centres)], -1)
    legal = ((boxes > 0.01) & (boxes < 0.99)).all(-1) & ~memory.padding
    far = torch.finfo(boxes.dtype).max
    return inverse_sigmoid(boxes, eps).masked_fill(~legal[..., None], far), legal
