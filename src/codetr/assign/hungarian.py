"""One-to-one matching for all layers, groups and images; on CUDA the host waits for nothing (DETR, eq. 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import softplus

from codetr.kernels.assignment import assign
from codetr.types import Known, Prediction, Problem, Targets

CACHED = 2**17  # costs computed at a time on a CPU


class Cost(Protocol):
    """What it costs that a query serves an object."""

    def of(self, problem: Problem, targets: Targets) -> list[Tensor]:
        """[l, B, M, N] each, of all layers of the problem together, in their order."""
        ...


@dataclass(frozen=True)
class MatchingCost:
    """Weights of the focal, L1 and GIoU costs, and the focal constants."""

    focal: float
    l1: float
    giou: float
    alpha: float
    gamma: float

    def of(self, problem: Problem, targets: Targets) -> list[Tensor]:
        """On a CPU so few layers at a time that what lies between stays in the cache: twice as fast."""
        labels = torch.zeros_like(targets.labels) if problem.class_agnostic else targets.labels
        logits = problem.prediction.logits
        block = len(logits)
        if logits.device.type == "cpu":
            block = max(1, CACHED // max(1, labels.shape[1] * logits[0, ..., 0].numel()))
        return [self(part, labels, targets.boxes) for part in problem.prediction.split(block, 0)]

    def __call__(self, prediction: Prediction, labels: Tensor, boxes: Tensor) -> Tensor:
        """prediction: [L, B, N, ...].
        labels: [B, M].
        boxes: [B, M, 4] cxcywh.

        Returns [L, B, M, N].

        Only between an image's own queries and objects, and only for the objects' classes; coordinate by coordinate
        and in place, since passes over memory are what it costs. With d the distance of two centres and e half the
        difference of two widths, L1 has d + 2e, and the intervals overlap by their mean width - max(d, e), negative
        where there is a gap; their hull is the mean width + max(d, e).
        """
        columns = labels[None, :, None].expand(*prediction.logits.shape[:3], -1)
        cost = self._focal(prediction.logits.gather(-1, columns).float().transpose(-1, -2).contiguous())
        objects = _halved(boxes)[:, None, ..., None]  # [4, 1, B, M, 1]
        queries = _halved(prediction.boxes.float())[..., None, :]  # [4, L, B, 1, N]
        overlaps, hulls = [], []
        for centre, side in ((0, 2), (1, 3)):
            distance = (objects[centre] - queries[centre]).abs_()
            difference = (objects[side] - queries[side]).abs_()
            cost.add_(distance, alpha=self.l1).add_(difference, alpha=2 * self.l1)
            apart = torch.maximum(distance, difference, out=distance)
            mean = torch.add(objects[side], queries[side], out=difference)
            overlaps.append((mean - apart).clamp_(min=0))
            hulls.append(mean.add_(apart))
        intersection, hull = overlaps[0].mul_(overlaps[1]), hulls[0].mul_(hulls[1]).clamp_(min=1e-7)
        areas = [4 * half[2] * half[3] for half in (objects, queries)]
        union = torch.add(*areas, out=overlaps[1]).sub_(intersection).clamp_(min=1e-7)
        giou = intersection.div_(union).add_(union.div_(hull)).sub_(1)
        return cost.sub_(giou, alpha=self.giou)

    def _focal(self, logits: Tensor) -> Tensor:
        """Focal loss of a positive minus that of a negative: -log p = softplus(-x), -log(1 - p) = softplus(x)."""
        probability, negative = logits.sigmoid(), softplus(logits)
        positive = negative - logits
        negative.mul_(probability**self.gamma)
        positive.mul_(probability.neg_().add_(1).pow_(self.gamma))
        return positive.mul_(self.focal * self.alpha).sub_(negative, alpha=self.focal * (1 - self.alpha))


def _halved(boxes: Tensor) -> Tensor:
    """[..., 4] -> [4, ...], one coordinate after the other: cx, cy, w / 2, h / 2."""
    cx, cy, w, h = boxes.unbind(-1)
    return torch.stack([cx, cy, w / 2, h / 2])


@torch.no_grad()
def match(problems: list[Problem], targets: Targets, cost: Cost) -> list[Known]:
    """Solve every layer and image of every problem exactly.

    Returns, per problem, targets for its queries: labels [L, B, N] (-1 background), boxes [L, B, N, 4] cxcywh, and
    which object it is.
    When an image has more (repeated) objects than queries, the cheapest subset is matched.

    Costs of predictions that are not finite count as the highest: their losses are not finite, whatever they match.
    """
    return [
        _targets_of(matched_objects(problem, targets, cost), targets, problem.class_agnostic) for problem in problems
    ]


@torch.no_grad()
def matched_objects(problem: Problem, targets: Targets, cost: Cost) -> Tensor:
    """The object that owns each query, among those of its image, -1 for none: [L, B, N]."""
    found = []
    for costs in cost.of(problem, targets):
        counts = targets.counts.repeat(len(costs))
        found.append(assign(costs.flatten(0, 1), counts, problem.repeats).unflatten(0, costs.shape[:2]))
    return torch.cat(found)


def _targets_of(matched_index: Tensor, targets: Targets, class_agnostic: bool) -> Known:
    """matched_index: [L, B, N], -1 for background."""
    index = matched_index.clamp(min=0)
    image = torch.arange(index.shape[1], device=index.device)[None, :, None]
    labels = torch.zeros_like(index) if class_agnostic else targets.labels[image, index]
    return Known(labels.masked_fill(matched_index < 0, -1), targets.boxes[image, index], index)
