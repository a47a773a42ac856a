"""One-to-one matching for all layers, groups and images from one device-to-host copy (DETR, eq. 1)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from codetr.types import Known, Prediction, Targets


@dataclass(frozen=True)
class MatchingCost:
    """Weights of the focal, L1 and GIoU costs, and the focal constants."""

    focal: float
    l1: float
    giou: float
    alpha: float
    gamma: float

    def __call__(self, prediction: Prediction, labels: Tensor, boxes: Tensor) -> Tensor:
        """prediction: [L, B, N, ...]. labels: [B, M]. boxes: [B, M, 4] cxcywh. Returns [L, B, M, N].

        Only between an image's own queries and objects, and only for the objects' classes; coordinate by coordinate
        and in place, since passes over memory are what it costs.
        """
        columns = labels[None, :, None].expand(*prediction.logits.shape[:3], -1)
        logits = prediction.logits.gather(-1, columns).float().transpose(-1, -2).contiguous()
        objects = boxes[None, :, :, None].unbind(-1)  # each [1, B, M, 1]
        predicted = prediction.boxes.float()[:, :, None].unbind(-1)  # each [L, B, 1, N]
        cost = self._focal(logits).mul_(self.focal)
        for a, b in zip(objects, predicted, strict=True):
            cost.add_((a - b).abs_(), alpha=self.l1)
        return cost.sub_(_giou(objects, predicted), alpha=self.giou)

    def _focal(self, logits: Tensor) -> Tensor:
        """Focal loss of a positive minus that of a negative; overwrites `logits`."""
        probability = logits.sigmoid_()
        rest = 1 - probability
        positive = (probability + 1e-12).log_()
        negative = (rest + 1e-12).log_()
        negative.mul_(probability.pow_(self.gamma)).mul_(1 - self.alpha)
        return negative.sub_(positive.mul_(rest.pow_(self.gamma)), alpha=self.alpha)


def _giou(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> Tensor:
    """GIoU of all pairs; cx, cy, w, h of boxes that broadcast against one another. -> e.g. [L, B, M, N]."""
    width, height = (
        torch.minimum(a[i] + a[i + 2] / 2, b[i] + b[i + 2] / 2).sub_(
            torch.maximum(a[i] - a[i + 2] / 2, b[i] - b[i + 2] / 2)
        )
        for i in (0, 1)
    )  # of the overlap, negative where there is none
    hull = (a[2] + b[2]).sub_(width).mul_((a[3] + b[3]).sub_(height)).clamp_(min=1e-7)
    intersection = width.clamp_(min=0).mul_(height.clamp_(min=0))
    union = (a[2] * a[3] + b[2] * b[3]).sub_(intersection).clamp_(min=1e-7)
    return intersection.div_(union).add_(union.div_(hull)).sub_(1)


@dataclass(frozen=True)
class Problem:
    """Stacked predictions to be matched against every object repeated `repeats` times. logits: [L, B, N, K]."""

    prediction: Prediction
    repeats: int = 1
    class_agnostic: bool = False


@torch.no_grad()
def match(problems: list[Problem], targets: Targets, cost: MatchingCost) -> list[Known]:
    """Solve every layer and image of every problem exactly.

    Returns, per problem, targets for its queries: labels [L, B, N] (-1 background) and boxes [L, B, N, 4] cxcywh.
    When an image has more (repeated) objects than queries, the cheapest subset is matched.

    Raises FloatingPointError when a prediction is not finite; the message names the image's index in the batch.
    """
    if not problems:
        return []
    costs = [_costs(problem, targets, cost) for problem in problems]
    flat = torch.cat([targets.counts.float(), *(c.flatten() for c in costs)]).cpu().numpy()
    counts, flat = flat[: len(targets.labels)].astype(int), flat[len(targets.labels) :]
    owners = []
    for problem, matrix in zip(problems, costs, strict=True):
        values, flat = flat[: matrix.numel()].reshape(matrix.shape), flat[matrix.numel() :]
        owners.append(_solve(values, counts, problem.repeats))
    packed = torch.from_numpy(np.concatenate([o.ravel() for o in owners])).to(targets.labels.device)
    return [
        _targets_of(owner.view(array.shape), targets, problem.class_agnostic)
        for owner, array, problem in zip(packed.split([o.size for o in owners]), owners, problems, strict=True)
    ]


def _costs(problem: Problem, targets: Targets, cost: MatchingCost) -> Tensor:
    """[L, B, M, N]; on a CPU a few layers at a time, so that what lies between stays in the cache: twice as fast."""
    labels = torch.zeros_like(targets.labels) if problem.class_agnostic else targets.labels
    logits, boxes = problem.prediction.logits, problem.prediction.boxes
    block = 8 if logits.device.type == "cpu" else len(logits)
    parts = zip(logits.split(block), boxes.split(block), strict=True)
    return torch.cat([cost(Prediction(*part), labels, targets.boxes) for part in parts])


def _solve(costs: np.ndarray, counts: np.ndarray, repeats: int) -> np.ndarray:
    """[L, B, M, N] -> [L, B, N]: the object that owns each query, -1 for none."""
    owner = np.full((*costs.shape[:2], costs.shape[3]), -1, dtype=np.int64)
    for image, count in enumerate(counts):
        matrices = costs[:, image, :count]
        if not np.isfinite(matrices).all():
            raise FloatingPointError(
                f"image {image} of the batch: predicted logits or boxes are not finite, so it cannot be matched; "
                "lower the learning rate, or train with precision bf16-mixed or 32-true instead of 16-mixed"
            )
        for layer, matrix in enumerate(matrices):
            rows, columns = linear_sum_assignment(np.tile(matrix, (repeats, 1)) if repeats > 1 else matrix)
            owner[layer, image, columns] = rows % count if count else rows
    return owner


def _targets_of(owner: Tensor, targets: Targets, class_agnostic: bool) -> Known:
    """owner: [L, B, N], -1 for background."""
    index = owner.clamp(min=0)
    image = torch.arange(index.shape[1], device=index.device)[None, :, None]
    labels = torch.zeros_like(index) if class_agnostic else targets.labels[image, index]
    return Known(labels.masked_fill(owner < 0, -1), targets.boxes[image, index])
