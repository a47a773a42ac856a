"""The detector: the only class that knows the whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from codetr.models.backbone import Backbone
from codetr.types import Memory, Output, Prediction, QueryContext, QueryGroup, Targets

MAIN = "main"


class Detector(nn.Module):
    """backbone -> neck -> encoder -> (pyramid -> auxiliary heads) -> query groups -> decoder.

    heads: auxiliary heads by name, `adapter` makes their pyramid; both only run in training. queries: query
    sources by name; `main` is the one that inference keeps.
    """

    def __init__(
        self,
        backbone: Backbone,
        neck: nn.Module,
        encoder: nn.Module,
        adapter: nn.Module | None,
        heads: Mapping[str, nn.Module],
        queries: Mapping[str, nn.Module],
        decoder: nn.Module,
    ) -> None:
        super().__init__()
        if MAIN not in queries:
            raise ValueError(f"a detector needs a query source named {MAIN!r}, got {sorted(queries)}")
        self.backbone, self.neck, self.encoder = backbone, neck, encoder
        self.adapter = adapter
        self.heads = nn.ModuleDict(heads)
        self.queries = nn.ModuleDict(queries)
        self.decoder = decoder

    def encode(self, images: Tensor, padding: Tensor) -> Memory:
        """images: [B, 3, H, W] uint8. padding: [B, H, W], True on padding."""
        normalized = self.backbone.normalize(images, padding)
        return self.encoder(self.neck(self.backbone(normalized)), padding)

    def forward(self, images: Tensor, padding: Tensor, targets: Targets | None = None) -> Output:
        """With targets: every group and every head's loss. Without: the main group alone."""
        memory = self.encode(images, padding)
        context = QueryContext(memory, targets)
        losses = {}
        if targets is not None and self.adapter is not None:
            pyramid = self.adapter(memory)
            for name, head in self.heads.items():
                output = head(pyramid, targets)
                losses[name], context.positives[name] = output.losses, output.positives
        groups = self._groups(context)
        return Output(groups, self.decoder(groups, memory), losses)

    def _groups(self, context: QueryContext) -> list[QueryGroup]:
        sources = [s for s in self.queries.values() if context.targets is not None or not s.training_only]
        return [group for source in sources for group in source(context)]

    def detect(self, images: Tensor, padding: Tensor) -> Prediction:
        """The last layer's predictions of the main group: logits [B, N, K], boxes [B, N, 4]."""
        prediction = self.forward(images, padding).predictions[MAIN]
        return Prediction(prediction.logits[-1], prediction.boxes[-1])

    def training_only_prefixes(self) -> tuple[str, ...]:
        """Prefixes of the parameters that inference neither needs nor builds."""
        sources = [f"queries.{name}." for name, source in self.queries.items() if source.training_only]
        return ("heads.", "adapter.", *sources)


def build_detector(
    backbone: Backbone,
    neck: Callable[..., nn.Module],
    encoder: nn.Module,
    adapter: Callable[..., nn.Module],
    heads: Mapping[str, nn.Module],
    queries: Mapping[str, nn.Module],
    decoder: nn.Module,
    num_levels: int,
) -> Detector:
    """Put the parts together, with what follows from the backbone: the neck's input and the pyramid's strides."""
    extra = num_levels - len(backbone.strides)
    strides = (*backbone.strides, *(backbone.strides[-1] * 2 ** (i + 1) for i in range(extra)))
    return Detector(
        backbone=backbone,
        neck=neck(in_channels=backbone.channels),
        encoder=encoder,
        adapter=adapter(strides=strides) if heads else None,
        heads=heads,
        queries=queries,
        decoder=decoder,
    )
