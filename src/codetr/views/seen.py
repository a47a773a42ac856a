"""What the views of one picture found, side by side, and which of it may be the same object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from codetr.types import Detections
from codetr.views.view import View


@dataclass(frozen=True)
class Seen:
    """Detections of several views of a picture, in its pixels, best first, where the views count them.

    found: all of them, n. view: [n], which view found each. windows, cores: [v, 4] xyxy of the views. size: (height,
    width) of the picture.
    """

    found: Detections
    view: Tensor
    windows: Tensor
    cores: Tensor
    size: tuple[int, int]

    @classmethod
    def of(cls, found: Sequence[Detections], views: Sequence[View], size: tuple[int, int]) -> Seen:
        """found: of each view."""
        view = torch.cat([torch.full_like(one.labels, i) for i, one in enumerate(found)])
        windows, cores = (torch.tensor([getattr(v, part) for v in views]).double() for part in ("box", "core"))
        seen = cls(together(found), view, windows, cores, size)
        return seen.at(inside(centers(seen.found.boxes_xyxy), cores[view]).nonzero()[:, 0]).sorted()

    def at(self, index: Tensor) -> Seen:
        """The detections at these places, [m]."""
        return replace(self, found=self.found.at(index), view=self.view[index])

    def sorted(self) -> Seen:
        return self.at(self.found.scores.argsort(descending=True, stable=True))


def together(found: Sequence[Detections]) -> Detections:
    """One after the other."""
    scores, labels, boxes = (torch.cat([getattr(one, p) for one in found]) for p in ("scores", "labels", "boxes_xyxy"))
    rle, mask_scores = [one.rle for one in found], [one.mask_scores for one in found]
    return Detections(
        scores,
        labels,
        boxes,
        None if any(own is None for own in rle) else [mask for own in rle for mask in own or ()],
        None if any(own is None for own in mask_scores) else torch.cat([own for own in mask_scores if own is not None]),
    )


def centers(boxes: Tensor) -> Tensor:
    return (boxes[:, :2] + boxes[:, 2:]) / 2


def inside(points: Tensor, boxes: Tensor) -> Tensor:
    """Whether each point [..., 2] lies in its box [..., 4], left and upper sides excluded -> [...]."""
    return ((boxes[..., :2] < points) & (points <= boxes[..., 2:])).all(-1)


class Pairs(NamedTuple):
    """better, worse: [p], places of detections, the first one the better. iou: [p], of what both views see of them."""

    better: Tensor
    worse: Tensor
    iou: Tensor


def meeting(seen: Seen, least: float, within: bool = False) -> Pairs:
    """Detections of one class from different views that overlap by more than `least`. within: of the same view, too.

    They are compared where both views see: of an object on the border of a tile the one next to it may see more.
    View by view, each with the detections of those alone whose windows meet its own: memory grows with their number,
    and not with its square.
    """
    boxes, labels = seen.found.boxes_xyxy.double(), seen.found.labels
    order = seen.view.argsort(stable=True)
    begins = [0, *seen.view.bincount(minlength=len(seen.windows)).cumsum(0).tolist()]
    of_view = [order[a:b] for a, b in pairwise(begins)]
    found = [torch.empty(2, 0, dtype=torch.long)]
    ious = [torch.empty(0, dtype=torch.double)]
    for own in range(len(seen.windows)):
        near = _overlap(seen.windows[own], seen.windows[own + (not within) :]).nonzero()[:, 0] + own + (not within)
        mine, others = of_view[own], torch.cat([order[:0], *(of_view[other] for other in near.tolist())])
        if not len(mine) or not len(others):
            continue
        iou = _iou_of_shared(boxes[mine], seen.windows[own], boxes[others], seen.windows[seen.view[others]])
        apart = (mine[:, None] < others) | (seen.view[others] != own)  # each pair of a view once
        a, b = ((iou > least) & (labels[mine, None] == labels[others]) & apart).nonzero(as_tuple=True)
        found.append(torch.stack([mine[a], others[b]]))
        ious.append(iou[a, b])
    better, worse = torch.cat(found, 1).sort(0).values
    return Pairs(better, worse, torch.cat(ious))


def _overlap(window: Tensor, windows: Tensor) -> Tensor:
    """[4], [v, 4] -> [v] bool."""
    return ((window[:2] < windows[:, 2:]) & (windows[:, :2] < window[2:])).all(1)


def _iou_of_shared(a: Tensor, window: Tensor, b: Tensor, windows: Tensor) -> Tensor:
    """IoU of boxes [m, 4] of a view with boxes [k, 4] of others, cut off at the others' windows and at this one's.

    window: [4] of this view. windows: [k, 4] of those that saw `b`. Returns [m, k].
    """
    shared = _area(_cut(a[:, None], b))
    union = _area(_cut(a[:, None], windows)) + _area(_cut(b, window)) - shared
    return shared / union.clamp(min=1e-9)


def _cut(boxes: Tensor, windows: Tensor) -> Tensor:
    return torch.cat(
        [torch.maximum(boxes[..., :2], windows[..., :2]), torch.minimum(boxes[..., 2:], windows[..., 2:])], -1
    )


def _area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1)
