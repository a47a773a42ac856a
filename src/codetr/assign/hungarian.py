"""One-to-one matching for all layers, groups and images from one device-to-host copy (DETR, eq. 1)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_convert

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

        Only between an image's own queries and objects, and only for the objects' classes.
        """
        columns = labels[None, :, None].expand(*prediction.logits.shape[:3], -1)
        probability = prediction.logits.gather(-1, columns).float().sigmoid().transpose(-1, -2)
        positive = self.alpha * (1 - probability) ** self.gamma * -(probability + 1e-12).log()
        negative = (1 - self.alpha) * probability**self.gamma * -(1 - probability + 1e-12).log()
        predicted = prediction.boxes.float()
        l1 = (boxes[None, :, :, None] - predicted[:, :, None]).abs().sum(-1)
        giou = _pairwise_giou(boxes, predicted)
        return self.focal * (positive - negative) + self.l1 * l1 - self.giou * giou


def _pairwise_giou(boxes: Tensor, predicted: Tensor) -> Tensor:
    """[B, M, 4], [L, B, N, 4] cxcywh -> [L, B, M, N]."""
    a = box_convert(boxes, "cxcywh", "xyxy")[None, :, :, None]
    b = box_convert(predicted, "cxcywh", "xyxy")[:, :, None]
    overlap = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0)
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).clamp(min=0)
    intersection, enclosed = overlap.prod(-1), hull.prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - intersection
    return intersection / union.clamp(min=1e-7) - (enclosed - union) / enclosed.clamp(min=1e-7)


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
    costs = [
        cost(
            p.prediction,
            torch.zeros_like(targets.labels) if p.class_agnostic else targets.labels,
            targets.boxes,
        )
        for p in problems
    ]
    flat = torch.cat([targets.counts.float(), *(c.flatten() for c in costs)]).cpu().numpy()
    counts, flat = flat[: len(targets.labels)].astype(int), flat[len(targets.labels) :]
    owners = []
    for problem, matrix in zip(problems, costs, strict=True):
        values, flat = flat[: matrix.numel()].reshape(matrix.shape), flat[matrix.numel() :]
        owners.append(_solve(values, counts, problem.repeats))
    packed = torch.from_numpy(np.concatenate([o.ravel() for o in owners])).to(targets.labels.device)
    shapes = [o.shape for o in owners]
    sizes = [o.size for o in owners]
    return [
        _targets_of(owner.view(shape), targets, problem.class_agnostic)
        for owner, shape, problem in zip(packed.split(sizes), shapes, problems, strict=True)
    ]


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
