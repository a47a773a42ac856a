"""Objects of one image pasted onto another (Ghiasi et al. 2021, Simple Copy-Paste)."""

from __future__ import annotations

from dataclasses import dataclass, replace

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
        # uint8 and maxima: torch reduces bool tensors fifty times slower.
        whole, pasted = onto.masks.as_subclass(Tensor), other.masks.as_subclass(Tensor)[chosen]
        front = pasted.amax(0) if count else pasted.new_zeros(pasted.shape[1:])
        left = whole * (1 - front)
        boxes = tight_boxes(left)
        kept = (boxes - tight_boxes(whole)).abs().amax(1) <= self.moved
        kept[~kept] = left[~kept].sum((1, 2)) > self.visible
        kept &= boxes[:, 2] > 0
        return replace(
            onto,
            image=wrap(torch.where(front.bool(), other.image, onto.image), like=onto.image),
            boxes=wrap(torch.cat([boxes[kept], tight_boxes(pasted)]), like=onto.boxes),
            labels=torch.cat([onto.labels[kept], other.labels[chosen]]),
            masks=wrap(torch.cat([left[kept], pasted]), like=onto.masks),
        )


def tight_boxes(masks: Tensor) -> Tensor:
    """[n, H, W] of 0 and 1 -> xyxy boxes of the ones [n, 4]; zero where there are none."""
    lows, highs = [], []
    for seen in (masks.amax(1), masks.amax(2)):  # columns, rows
        index = torch.arange(seen.shape[1])
        lows.append(index.where(seen > 0, seen.shape[1]).amin(1))
        highs.append((index + 1).where(seen > 0, 0).amax(1))
    return torch.stack([*lows, *highs], 1).where(highs[0][:, None] > 0, 0).float()
