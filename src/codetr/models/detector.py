"""The detector: the only class that knows the whole."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from codetr.errors import UserError
from codetr.models.agreement import check_agreement, check_names
from codetr.models.decoder import GroupDecoder
from codetr.models.freezing import named_parts
from codetr.types import (
    MAIN,
    AuxiliaryHead,
    Detections,
    Encoder,
    ImageBackbone,
    MaskHead,
    Masks,
    Memory,
    Neck,
    Output,
    Prediction,
    Pyramid,
    QueryContext,
    QuerySource,
    Targets,
)

Adapter = Callable[[Memory], Pyramid]
_REPLICA = re.compile(r"group_\d+")  # what `build_detector` calls the further groups of main queries


class Detector(nn.Module):
    """backbone -> neck -> encoder -> (pyramid -> auxiliary heads) -> query groups -> decoder.

    heads: auxiliary heads by name, `adapter` makes their pyramid; both only run in training.
    queries: query sources by name, in the order of their making; `main` comes first and is the one that inference
        keeps.
    mask_head: instance masks of the decoder's boxes, on the same pyramid, at inference too; it learns from the last
        layer's boxes of the groups `mask_groups`, as far as they exist.
    """

    def __init__(
        self,
        backbone: ImageBackbone,
        neck: Neck,
        encoder: Encoder,
        adapter: Adapter | None,
        heads: Mapping[str, AuxiliaryHead],
        queries: Mapping[str, QuerySource],
        decoder: GroupDecoder,
        mask_head: MaskHead | None,
        mask_groups: tuple[str, ...],
    ) -> None:
        super().__init__()
        if next(iter(queries), None) != MAIN:
            raise ValueError(f"a detector needs a first query source named {MAIN!r}, got {list(queries)}")
        self.backbone, self.neck, self.encoder = backbone, neck, encoder
        self.adapter = adapter
        self.heads = nn.ModuleDict(cast("Mapping[str, nn.Module]", heads))
        self.queries = nn.ModuleDict(cast("Mapping[str, nn.Module]", queries))
        self.decoder = decoder
        self.mask_head, self.mask_groups = mask_head, mask_groups
        self._frozen: list[nn.Module] = []

    @property
    def finds_masks(self) -> bool:
        """Whether it finds instance masks: of boxes, by a mask head, or of queries, by the decoder."""
        return self.mask_head is not None or self.decoder.predicts_masks

    def freeze(self, names: Sequence[str]) -> None:
        """Let parts keep their weights and their running statistics, and drop nothing out, in training too.

        names: see `codetr.models.freezing.named_parts`. Raises UserError for an unknown one, and where no weight is
        left to train.
        """
        self._frozen += [part for name in names for part in named_parts(self, name)]
        for part in self._frozen:
            part.requires_grad_(False)
        if not any(parameter.requires_grad for parameter in self.parameters()):
            raise UserError(f"freeze={list(names)}: nothing is left to train")
        self.train(self.training)

    def train(self, mode: bool = True) -> Detector:
        super().train(mode)
        for part in self._frozen:
            part.eval()
        return self

    def encode(self, images: Tensor, padding: Tensor) -> Memory:
        """images: [B, 3, H, W] uint8. padding: [B, H, W], True on padding."""
        normalized = self.backbone.normalize(images, padding)
        return self.encoder(self.neck(self.backbone(normalized)), padding)

    def forward(self, images: Tensor, padding: Tensor, targets: Targets | None = None) -> Output:
        """With targets, run every group and every head's loss; without, the main group alone."""
        memory = self.encode(images, padding)
        context = QueryContext(memory, targets)
        pyramid = self.adapter(memory) if targets is not None and self.adapter is not None else None
        head_losses = {}
        for name, head in self.heads.items() if pyramid is not None else ():
            output = head(pyramid, targets)
            head_losses[name], context.positives[name] = output.losses, output.positives
        self._ask_sources(context)
        predictions = self.decoder(context.groups, memory)
        mask_losses = {}
        if self.mask_head is not None and pyramid is not None and targets is not None:
            mask_losses = self.mask_head.losses(pyramid, self._candidates(predictions), targets)
        return Output(context.groups, predictions, head_losses, mask_losses, memory)

    def _candidates(self, predictions: dict[str, Prediction]) -> Prediction:
        """The last layer's predictions from which the mask head learns."""
        return Prediction.joined([predictions[name].last for name in self.mask_groups if name in predictions], 1)

    def _ask_sources(self, context: QueryContext) -> None:
        for name, source in self.queries.items():
            if name == MAIN or context.targets is not None:
                context.groups[name] = source(context)

    def decode(self, memory: Memory) -> dict[str, Prediction]:
        """What inference predicts from a memory: of the main group alone, by its name."""
        context = QueryContext(memory)
        self._ask_sources(context)
        return self.decoder(context.groups, memory)

    @property
    def main_groups(self) -> list[str]:
        """Names of the groups of main queries (Group DETR), the one that inference keeps first."""
        return [name for name in self.queries if name == MAIN or _REPLICA.fullmatch(name)]

    def keep_group(self, number: int) -> None:
        """Let inference keep another one of the groups of main queries (Group DETR, footnote 2).

        number: from 1, the one that it keeps already. The two change places. Raises UserError where there is no such
        group.
        """
        names = self.main_groups
        if not 1 <= number <= len(names):
            raise UserError(f"group={number}: this detector has {len(names)} groups of main queries")
        name = names[number - 1]
        self.queries[MAIN], self.queries[name] = self.queries[name], self.queries[MAIN]

    def detect(self, images: Tensor, padding: Tensor) -> Prediction:
        """The last layer's predictions of the main group, [B, N, ...]."""
        return self.forward(images, padding).predictions[MAIN].last

    @torch.no_grad()
    def detect_with_heads(self, memory: Memory, sizes: Tensor) -> dict[str, list[Detections]]:
        """What each auxiliary head finds on its own (Co-DETR, table 11), in network pixels.

        sizes: [B, 2] (height, width) of the images, as in `Frames`.
        """
        if self.adapter is None:
            return {}
        pyramid = self.adapter(memory)
        heads = cast("Mapping[str, AuxiliaryHead]", self.heads)
        return {name: head.detect(pyramid, sizes) for name, head in heads.items()}

    @torch.no_grad()
    def segment(self, memory: Memory, detections: list[Detections]) -> list[Masks]:
        """Instance masks of detections in network pixels, each in its box. Raises ValueError without a mask head."""
        if self.mask_head is None or self.adapter is None:
            raise ValueError("this detector has no mask head (model.detector.mask_head)")
        return self.mask_head.segment(self.adapter(memory), detections)

    def segment_all(self, memory: Memory, boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """As `segment`, of as many boxes in every image (see `MaskHead`). Raises ValueError without a mask head."""
        if self.mask_head is None or self.adapter is None:
            raise ValueError("this detector has no mask head (model.detector.mask_head)")
        return self.mask_head.segment_all(self.adapter(memory), boxes, labels)

    def training_only_prefixes(self) -> tuple[str, ...]:
        """Prefixes of the parameters that inference neither needs nor builds."""
        sources = [f"queries.{name}." for name in self.queries if name != MAIN]
        return ("heads.", *(["adapter."] if self.mask_head is None else []), *sources)


def build_detector(
    backbone: ImageBackbone,
    neck: Callable[..., Neck],
    encoder: Encoder,
    adapter: Callable[..., Adapter],
    heads: Mapping[str, AuxiliaryHead],
    main: Callable[..., QuerySource],
    query_groups: int,
    collaborative: Callable[..., QuerySource] | None,
    queries: Mapping[str, Callable[..., QuerySource] | None],
    decoder: Any,
    mask_groups: tuple[str, ...],
    mask_head: MaskHead | None = None,
) -> Detector:
    """Put the parts together, with what follows from them: the neck's input and the memory's strides from the backbone,
    whether query sources bring positions from the decoder's position rule, a query group from every head.

    main: makes the main query source.
    query_groups: K of Group DETR: so many sources of this kind, with parameters of their own, each matched on its own;
        all but the first only train. Their losses are averaged, as in LW-DETR's code; the paper does not say.
    collaborative: makes the query source of each auxiliary head; None: heads only have their losses.
    queries: make further sources. One under a head's name takes the place of that head's, None leaves it out.

    Raises UserError when the parts do not fit together.
    """
    makers = {**dict.fromkeys(heads, collaborative), **queries}
    check_names(heads, makers)
    embed_position = decoder.query_position.wants_position
    sources = {
        name: make(embed_position=embed_position, **({"head": name} if name in heads else {}))
        for name, make in makers.items()
        if make is not None
    }
    levels = neck(in_channels=backbone.channels)
    strides = levels.strides(backbone.strides)
    main = partial(main, embed_position=embed_position, weight=1 / query_groups)
    sources = {MAIN if k == 1 else f"group_{k}": main() for k in range(1, query_groups + 1)} | sources
    check_agreement(strides, encoder, sources, decoder, mask_head)
    return Detector(
        backbone=backbone,
        neck=levels,
        encoder=encoder,
        adapter=adapter(strides=strides[-encoder.memory_levels :]) if heads or mask_head else None,
        heads=heads,
        queries=sources,
        decoder=decoder,
        mask_head=mask_head,
        mask_groups=tuple(mask_groups),
    )
