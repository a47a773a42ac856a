"""Objects of one image pasted onto another (Ghiasi et al. 2021, Simple Copy-Paste)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torchvision.tv_tensors import wrap

from codetr.data.coco import Sample


@dataclass(frozen=True)
class CopyPaste:
    """Pastes 0..`most` random objects of another image of the same size, each number as often, in front of all others.

    Boxes are then those of the visible parts. An object is kept where no side of its box moved by more than `moved`
    pixels, or where more than `visible` pixels of it are left. Random numbers: torch's.
    """

    most: int
    moved: float
    visible: int

    def __call__(self, onto: Sample, other: Sample) -> Sample:
        assert onto.masks is not None
        assert other.masks is not None
        count = int(torch.randint(min(len(other.labels), self.most) + 1, ()))
        chosen = torch.randperm(len(other.labels))[:count]
        pasted = other.masks[chosen].bool()
        front = pasted.any(0)
        whole = onto.masks.bool()
        left = whole & ~front
        boxes, seen = tight_boxes(left), left.sum((1, 2))
        still = (boxes - tight_boxes(whole)).abs().amax(1) <= self.moved
        kept = (seen > 0) & (still | (seen > self.visible))
        return replace(
            onto,
            image=wrap(torch.where(front, other.image, onto.image), like=onto.image),
            boxes=_like(torch.cat([boxes[kept], tight_boxes(pasted)]), onto.boxes),
            labels=torch.cat([onto.labels[kept], other.labels[chosen]]),
            masks=_like(torch.cat([left[kept], pasted]), onto.masks),
        )


def tight_boxes(masks: Tensor) -> Tensor:
    """[n, H, W] bool -> xyxy boxes of their pixels [n, 4]; zero where there are none."""
    lows, highs = [], []
    for seen in (masks.any(1), masks.any(2)):  # columns, rows
        index = torch.arange(seen.shape[1])
        lows.append(index.where(seen, seen.shape[1]).amin(1))
        highs.append((index + 1).where(seen, 0).amax(1))
    boxes = torch.stack([*lows, *highs], 1).float()
    return boxes.where(masks.flatten(1).any(1)[:, None], 0)


def _like(value: Tensor, like: Any) -> Any:
    return wrap(value.to(like.dtype), like=like)
