"""Objects of one image pasted onto another (Ghiasi et al. 2021, Simple Copy-Paste)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torchvision.tv_tensors import wrap

from codetr.data.dataset import Sample
from codetr.nn.boxes import tight_boxes


@dataclass(frozen=True)
class CopyPaste:
    """Pastes 0..`most` random objects of another image of the same size, each number as often, in front of all others.

    A `codetr.data.mixing.Mixer`.
    Boxes are then those of the visible parts. An object is kept where no side of its box moved by more than `moved`
    pixels, or where more than `visible` pixels of it are left. Random numbers: torch's.
    """

    needs_masks = True
    most: int
    moved: float
    visible: int

    def __call__(self, onto: Sample, another: Callable[[], Sample]) -> Sample:
        other = another()
        assert onto.masks is not None
        assert other.masks is not None
        count = int(torch.randint(min(len(other.labels), self.most) + 1, ()))
        chosen = torch.randperm(len(other.labels))[:count]
        whole = onto.masks.as_subclass(Tensor)
        # One piece of memory for all: masks of a large canvas cost more to copy than to compare.
        masks = whole.new_empty(len(whole) + count, *whole.shape[1:])
        left, pasted = masks[: len(whole)], masks[len(whole) :]
        torch.index_select(other.masks.as_subclass(Tensor), 0, chosen, out=pasted)
        # uint8 and maxima: torch reduces bool tensors fifty times slower.
        front = pasted.amax(0) if count else pasted.new_zeros(pasted.shape[1:])
        torch.mul(whole, 1 - front, out=left)
        boxes = tight_boxes(masks)
        kept = (boxes[: len(whole)] - tight_boxes(whole)).abs().amax(1) <= self.moved
        for i in (~kept).nonzero().flatten().tolist():
            kept[i] = bool(np.count_nonzero(left[i].numpy()) > self.visible)
        kept &= boxes[: len(whole), 2] > 0
        stays = torch.cat([kept, kept.new_ones(count)])
        return replace(
            onto,
            image=wrap(torch.where(front.bool(), other.image, onto.image), like=onto.image),
            boxes=wrap(boxes[stays], like=onto.boxes),
            labels=torch.cat([onto.labels, other.labels[chosen]])[stays],
            masks=wrap(masks if stays.all() else masks[stays], like=onto.masks),
        )

    def most_objects(self, own: int, other: int) -> int:
        return own + min(other, self.most)
