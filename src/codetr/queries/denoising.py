"""Contrastive denoising queries: noised ground truth with known targets (DN-DETR; DINO, sec. 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert

from codetr.types import Known, QueryContext, QueryGroup, Targets


class DenoisingQueries(nn.Module):
    """Blocks of noised objects that the decoder must restore; each block holds every object twice.

    The first of the two is a positive (corners moved by less than `box_noise` half-sizes, to be restored), the
    second a negative (moved by one to two times that, to be called background). The decoder derives the positions.

    num_queries: positives per image, shared among as many blocks as fit. label_noise: twice the share of labels
    replaced by a random class.
    """

    training_only = True

    def __init__(
        self, width: int, num_classes: int, num_queries: int, label_noise: float, box_noise: float, weight: float
    ) -> None:
        super().__init__()
        self.num_classes, self.num_queries = num_classes, num_queries
        self.label_noise, self.box_noise, self.weight = label_noise, box_noise, weight
        self.label_embedding = nn.Embedding(num_classes, width)

    def forward(self, context: QueryContext) -> list[QueryGroup]:
        assert context.targets is not None
        targets = context.targets
        batch, most = targets.labels.shape
        blocks = max(1, self.num_queries // most)
        shape = (batch, blocks, 2, most)
        labels = targets.labels[:, None, None].expand(shape)
        positive = torch.tensor([True, False], device=labels.device)[:, None].expand(shape)
        boxes = targets.boxes[:, None, None].expand(*shape, 4)
        return [
            QueryGroup(
                name="denoising",
                content=self.label_embedding(self._noised_labels(labels)).flatten(1, 3),
                reference=self._noised_boxes(boxes, positive).flatten(1, 3),
                targets=_known(targets, labels, boxes, positive),
                valid=targets.valid[:, None, None].expand(shape).flatten(1),
                sees=("main",),
                blocks=blocks,
                weight=self.weight,
            )
        ]

    def _noised_labels(self, labels: Tensor) -> Tensor:
        replace = torch.rand(labels.shape, device=labels.device) < self.label_noise / 2
        return torch.where(replace, torch.randint_like(labels, self.num_classes), labels)

    def _noised_boxes(self, boxes: Tensor, positive: Tensor) -> Tensor:
        """boxes: [..., 4] cxcywh. Moves each corner by a random share of the half size."""
        corners = box_convert(boxes, "cxcywh", "xyxy")
        half = boxes[..., 2:].repeat(*[1] * (boxes.dim() - 1), 2) / 2  # (w, h, w, h) / 2
        sign = torch.randint_like(boxes, 2) * 2 - 1
        amount = torch.rand_like(boxes) + (~positive)[..., None]
        moved = (corners + sign * amount * half * self.box_noise).clamp(0, 1)
        return box_convert(moved, "xyxy", "cxcywh")


def _known(targets: Targets, labels: Tensor, boxes: Tensor, positive: Tensor) -> Known:
    real = positive & targets.valid[:, None, None]
    return Known(labels.masked_fill(~real, -1).flatten(1), boxes.flatten(1, 3))
