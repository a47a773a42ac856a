"""The decoder's pass with masks in the place of boxes (Mask2Former, Cheng et al. 2022, sec. 3.2)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from codetr.models.decoder import Course, GroupDecoder
from codetr.nn.class_rows import ClassRows, by_class
from codetr.nn.mlp import MLP
from codetr.types import Memory, Pixels, Prediction, QueryGroup, QueryMasks


class MaskDecoder(GroupDecoder):
    """Predicts classes, "no object" among them, and masks: before the first layer and behind every one.

    All of that from one norm, one classifier and one mask embedding. The reference of a query is the embedding of the
    mask that it predicted last, without gradient; what a group brings as reference is not used.

    layer: makes one decoder layer, whose cross-attention takes such references.
    query_position: the position rule.
    mask_width: E, of the embeddings of masks; as the encoder's.
    checkpointed_layers: the first n layers recompute their activations in the backward pass.
    """

    predicts_masks = True

    def __init__(
        self,
        width: int,
        num_classes: int,
        num_layers: int,
        layer: Callable[[], nn.Module],
        query_position: nn.Module,
        mask_width: int,
        checkpointed_layers: int,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer() for _ in range(num_layers))
        self.class_heads = nn.ModuleList([by_class(nn.Linear(width, num_classes + 1), ClassRows(rest=1))])
        self.mask_embedding = MLP(width, width, mask_width, 3)
        self.query_position = query_position
        self.norm = nn.LayerNorm(width)
        self.mask_width, self.checkpointed_layers = mask_width, checkpointed_layers

    def course(self, groups: dict[str, QueryGroup], content: Tensor, memory: Memory) -> Course:
        """Raises ValueError for a memory without embeddings of pixels."""
        if memory.pixels is None:
            raise ValueError("a decoder of masks needs an encoder that embeds pixels: PixelDecoder")
        return _MaskCourse(self, content, memory.pixels)


class _MaskCourse:
    """Queries look into their masks."""

    def __init__(self, decoder: MaskDecoder, content: Tensor, pixels: Pixels) -> None:
        self.decoder, self.pixels = decoder, pixels
        self.logits: list[Tensor] = []
        self.embeddings: list[Tensor] = []
        self.reference = self._predict(content)

    def step(self, index: int, content: Tensor) -> None:
        self.reference = self._predict(content)

    def prediction(self) -> Prediction:
        logits, embeddings = torch.stack(self.logits), torch.stack(self.embeddings)
        dtype = torch.promote_types(logits.dtype, torch.float32)  # as boxes have
        none = logits.new_empty(*logits.shape[:-1], 0, dtype=dtype)
        return Prediction(logits, none, QueryMasks(embeddings, self.pixels))

    def _predict(self, content: Tensor) -> Tensor:
        output = self.decoder.norm(content)
        self.logits.append(self.decoder.class_heads[0](output))
        self.embeddings.append(self.decoder.mask_embedding(output))
        return self.embeddings[-1].detach()
