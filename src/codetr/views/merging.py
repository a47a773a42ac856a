"""What becomes of the detections of an object in several views."""

from __future__ import annotations

from dataclasses import dataclass, replace
from heapq import heapify, heappop, heappush
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from codetr.postprocess import SoftNMS as _SoftNMS
from codetr.types import Detections
from codetr.views.seen import Pairs, Seen, centers, inside, meeting


class Merge(Protocol):
    """One detection for each object, best first.

    floor: the least score of a detection that matters where those with at least `score_threshold` are asked for.
    """

    def floor(self, score_threshold: float) -> float: ...

    def __call__(self, seen: Seen) -> Detections: ...


@dataclass(frozen=True)
class NMS:
    """Drops a detection that overlaps a better one of its class from another view by more than `iou`. Within a view
    nothing is dropped: that is for `postprocess`."""

    iou: float = 0.5

    def floor(self, score_threshold: float) -> float:
        return score_threshold

    def __call__(self, seen: Seen) -> Detections:
        better, worse, _ = meeting(seen, self.iou)
        left = torch.ones_like(seen.view, dtype=torch.bool)
        while True:  # ends: after n rounds the first n are as they will stay
            after = torch.ones_like(left).index_fill(0, worse[left[better]], False)
            if torch.equal(after, left):
                return seen.found.at(left.nonzero()[:, 0])
            left = after


@dataclass(frozen=True)
class SoftNMS(_SoftNMS):
    """Lowers the score of a detection that overlaps a better one of its class from another view, as
    `codetr.postprocess.SoftNMS` does within one."""

    method: Literal["linear", "gaussian"] = "linear"
    iou: float = 0.5
    sigma: float = 0.5
    min_score: float = 0.001

    def floor(self, score_threshold: float) -> float:
        return score_threshold  # scores only fall, and what is worse lowers nothing that is better

    def __call__(self, seen: Seen) -> Detections:  # type: ignore[override]
        scores = seen.found.scores.tolist()
        neighbours = _neighbours(meeting(seen, 0.0), len(scores))
        factors = [self.factor(iou).tolist() for _, iou in neighbours]
        waiting = [(-score, i) for i, score in enumerate(scores)]
        heapify(waiting)
        kept: list[int] = []
        done = [False] * len(scores)
        while waiting:
            score, i = heappop(waiting)
            if done[i] or -score != scores[i]:  # it has been lowered since
                continue
            done[i] = True
            if scores[i] >= self.min_score:
                kept.append(i)
            for j, factor in zip(neighbours[i][0].tolist(), factors[i], strict=True):
                if not done[j] and factor < 1:
                    scores[j] *= factor
                    heappush(waiting, (-scores[j], j))
        found = seen.found.at(torch.tensor(kept, dtype=torch.long))
        return replace(found, scores=found.scores.new_tensor([scores[i] for i in kept]))


def _neighbours(pairs: Pairs, count: int) -> list[tuple[Tensor, Tensor]]:
    """Of each detection those that it meets, and their IoU."""
    own, other = (torch.cat(two) for two in ((pairs.better, pairs.worse), (pairs.worse, pairs.better)))
    order = own.argsort(stable=True)
    sizes = own.bincount(minlength=count).tolist()
    return list(zip(other[order].split(sizes), pairs.iou.repeat(2)[order].split(sizes), strict=True))


@dataclass(frozen=True)
class WBF:
    """Weighted boxes fusion (Solovyev et al. 2021, arXiv 1910.13302): detections of a class that overlap become one,
    whose box is their mean weighted by scores; its score is their mean, times the share of the views that found it.

    In place of the number of models stands that of the views in whose cores the object lies. A mask is that of the best
    detection.

    iou: with the box so far, above which a detection joins it.
    min_score: worse detections take no part; many of them would lower the mean.
    """

    iou: float = 0.55
    min_score: float = 0.05

    def floor(self, score_threshold: float) -> float:
        return self.min_score

    def __call__(self, seen: Seen) -> Detections:
        seen = seen.at((seen.found.scores >= self.min_score).nonzero()[:, 0])
        boxes, scores = seen.found.boxes_xyxy.double().numpy(), seen.found.scores.double().numpy()
        cluster = self._clusters(boxes, scores, meeting(seen, 0.0, within=True))
        count, first = np.bincount(cluster), np.unique(cluster, return_index=True)[1]
        total = np.bincount(cluster, scores)
        sums = np.stack([np.bincount(cluster, boxes[:, side] * scores) for side in range(4)], 1)
        fused = torch.from_numpy(sums / total[:, None])
        views = _views_at(centers(fused), seen.cores)
        score = torch.from_numpy(total / count) * torch.from_numpy(count).clamp(max=views) / views
        best = seen.found.at(torch.from_numpy(first))
        found = replace(best, scores=score.to(best.scores), boxes_xyxy=fused.to(best.boxes_xyxy))
        return found.at(found.scores.argsort(descending=True, stable=True))

    def _clusters(self, boxes: np.ndarray, scores: np.ndarray, pairs: Pairs) -> np.ndarray:
        """[n]: to which cluster each detection belongs, in the order of their beginning."""
        cluster = np.full(len(boxes), -1)
        sums, totals = np.zeros_like(boxes), np.zeros(len(boxes))
        order = pairs.worse.argsort(stable=True)
        sizes = pairs.worse.bincount(minlength=len(boxes)).cumsum(0)[:-1].tolist()
        better = np.split(pairs.better[order].numpy(), sizes)
        begun = 0
        for i, box in enumerate(boxes):
            near = np.unique(cluster[better[i]])
            ious = _iou(sums[near] / totals[near, None], box)
            if len(near) and ious.max() > self.iou:
                cluster[i] = near[ious.argmax()]
            else:
                cluster[i], begun = begun, begun + 1
            sums[cluster[i]] += scores[i] * box
            totals[cluster[i]] += scores[i]
        return cluster


def _iou(boxes: np.ndarray, box: np.ndarray) -> np.ndarray:
    """[k, 4], [4] -> [k]."""
    sides = np.minimum(boxes[:, 2:], box[2:]) - np.maximum(boxes[:, :2], box[:2])
    shared = sides.clip(min=0).prod(1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1) + (box[2:] - box[:2]).prod()
    return shared / np.maximum(areas - shared, 1e-12)


def _views_at(points: Tensor, cores: Tensor) -> Tensor:
    """How many views count what lies at each point: [k, 2], [v, 4] -> [k], at least 1."""
    kinds, number = cores.unique(dim=0, return_counts=True)
    found = torch.zeros(len(points), dtype=torch.long)
    for core, times in zip(kinds, number.tolist(), strict=True):
        found += inside(points, core) * times
    return found.clamp(min=1)
