"""Denoising queries: noised ground truth with known targets (DN-DETR; DINO, sec. 3.3)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torchvision.ops import box_convert

from codetr.errors import UserError
from codetr.nn.boxes import inverse_sigmoid
from codetr.nn.class_rows import by_class
from codetr.types import MAIN, Known, QueryContext, QueryGroup, Targets


class DenoisingQueries(nn.Module):
    """Blocks of noised objects that the decoder must restore. It derives their positions; they may look at the main
    group, never the reverse.

    contrastive: each block holds every object twice, a positive (corners moved by less than `box_noise` half sizes, to
    be restored) and a negative (moved by one to two times that, to be called background) (DINO). Otherwise once: its
    centre moved within `box_noise` half sizes, its sides scaled by up to 1 +- `box_noise` (DN-DETR, sec. 3.4).

    num_queries: positives per image, shared among as many blocks as fit.
    label_noise: share of the labels that are replaced by a random class.
    indicator: the last channel of the content is 1 (DN-DETR).
    unused: slots of an image with fewer objects than another one are not seen at all ("masked"), or empty queries at
        the centre that must be called background ("background", the official Co-DINO).
    eps: no noised coordinate is nearer to 0 or 1 than about this.
    weight: of its losses.
    static: as many places whatever the batch holds, of which as many blocks are taken as fit: the group's size does not
        depend on the largest number of objects, and the host need not know it.
    embed_position: whether the decoder wants positions.

    Raises UserError when it does.
    """

    def __init__(
        self,
        width: int,
        num_classes: int,
        num_queries: int,
        contrastive: bool,
        label_noise: float,
        box_noise: float,
        indicator: bool,
        unused: Literal["masked", "background"],
        eps: float,
        weight: float,
        embed_position: bool,
        static: bool = False,
    ) -> None:
        super().__init__()
        if embed_position:
            raise UserError(
                "denoising queries bring boxes alone, and the decoder takes the positions of its queries: leave them "
                "out, or let it derive positions, model/position@model.detector.decoder.query_position=reference or "
                "modulated"
            )
        self.num_classes, self.num_queries, self.contrastive = num_classes, num_queries, contrastive
        self.label_noise, self.box_noise, self.weight = label_noise, box_noise, weight
        self.indicator, self.unused, self.eps, self.static = indicator, unused, eps, static
        self.brings_reference = True
        self.label_embedding = by_class(nn.Embedding(num_classes, width - indicator))

    def forward(self, context: QueryContext) -> QueryGroup:
        assert context.targets is not None
        targets, parts, taken = context.targets, None, None
        blocks = max(1, self.num_queries // targets.labels.shape[1])
        if self.static:
            targets, parts, taken = self._laid_out(targets)
            blocks = 1
        batch, most = targets.labels.shape
        shape = (batch, blocks, 2 if self.contrastive else 1, most)
        labels = targets.labels[:, None, None].expand(shape)
        positive = (torch.arange(shape[2], device=labels.device) == 0)[:, None].expand(shape)
        boxes = targets.boxes[:, None, None].expand(*shape, 4)
        noised = move_corners(boxes, positive, self.box_noise) if self.contrastive else jitter(boxes, self.box_noise)
        content, used = self._content(labels), targets.valid[:, None, None].expand(shape)
        if self.unused == "background":
            content, noised = content * used[..., None], noised.where(used[..., None], 0.5)
            used = targets.valid.any().expand(shape)  # without any object there is no such group
            used = used if taken is None else used & taken
        return QueryGroup(
            content=content.flatten(1, 3),
            reference=inverse_sigmoid(noised, self.eps).sigmoid().flatten(1, 3),
            targets=_known(targets, labels, boxes, positive),
            valid=used.flatten(1),
            sees=(MAIN,),
            blocks=blocks,
            parts=None if parts is None else parts.repeat(shape[2]),
            weight=self.weight,
        )

    def _laid_out(self, targets: Targets) -> tuple[Targets, Tensor, Tensor]:
        """The objects of all blocks, one block after the other, with the block of each place and whether it is taken:
        labels [B, places], [places], [places]. A block has as many as the image with most objects."""
        most = targets.counts.max().clamp(min=1)
        place = torch.arange(max(self.num_queries, targets.labels.shape[1]), device=most.device)
        part, objects = place // most, place % most
        taken = part < (self.num_queries // most).clamp(min=1)
        valid = targets.valid[:, objects] & taken
        return Targets(targets.boxes[:, objects], targets.labels[:, objects], valid, targets.frames), part, taken

    def _content(self, labels: Tensor) -> Tensor:
        replace = torch.rand(labels.shape, device=labels.device) < self.label_noise
        labels = torch.where(replace, torch.randint_like(labels, self.num_classes), labels)
        content = self.label_embedding(labels)
        return pad(content, (0, 1), value=1.0) if self.indicator else content


def move_corners(boxes: Tensor, positive: Tensor, noise: float) -> Tensor:
    """Move each corner by a random share of the half size.

    boxes: [..., 4] cxcywh.
    positive: [...] bool.

    A negative's corners may pass each other; its size is then zero.
    """
    corners = box_convert(boxes, "cxcywh", "xyxy")
    half = boxes[..., 2:].repeat(*[1] * (boxes.dim() - 1), 2) / 2  # (w, h, w, h) / 2
    sign = torch.randint_like(boxes, 2) * 2 - 1
    amount = torch.rand_like(boxes) + (~positive)[..., None]
    moved = (corners + sign * amount * half * noise).clamp(0, 1)
    return box_convert(moved, "xyxy", "cxcywh").clamp(min=0)


def jitter(boxes: Tensor, noise: float) -> Tensor:
    """Move centres and scale sides. boxes: [..., 4] cxcywh."""
    width, height = boxes[..., 2:].unbind(-1)
    range_ = torch.stack([width / 2, height / 2, width, height], -1)
    return (boxes + (torch.rand_like(boxes) * 2 - 1) * range_ * noise).clamp(0, 1)


def _known(targets: Targets, labels: Tensor, boxes: Tensor, positive: Tensor) -> Known:
    real = positive & targets.valid[:, None, None]
    return Known(labels.masked_fill(~real, -1).flatten(1), boxes.flatten(1, 3))
