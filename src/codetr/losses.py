"""Losses of single predictions: of boxes, and of classes.

The latter are each called with (logits [..., K], labels [...], quality [...]) -> [..., K], elementwise. labels: the
class, or -1 for background. quality: in [0, 1], the IoU of the predicted with the target box, without gradient; only
read where the label is a class. `Focal` does not read it at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from torchvision.ops import sigmoid_focal_loss

EPS = 1e-7  # keeps the GIoU of boxes without area finite


def giou_loss(boxes: Tensor, goals: Tensor) -> Tensor:
    """1 - GIoU of corresponding xyxy boxes (Rezatofighi et al. 2019, algorithm 1): [..., 4], [..., 4] -> [...].

    The digits of torchvision's `generalized_box_iou_loss`, which makes the host wait: it indexes by a mask.
    """
    low, high = torch.maximum(boxes[..., :2], goals[..., :2]), torch.minimum(boxes[..., 2:], goals[..., 2:])
    intersection = _area(low, high).where((high > low).all(-1), 0)
    union = _area(*boxes.split(2, -1)) + _area(*goals.split(2, -1)) - intersection
    hull = _area(torch.minimum(boxes[..., :2], goals[..., :2]), torch.maximum(boxes[..., 2:], goals[..., 2:]))
    return 1 - (intersection / (union + EPS) - (hull - union) / (hull + EPS))


def _area(low: Tensor, high: Tensor) -> Tensor:
    width, height = (high - low).unbind(-1)
    return width * height


class ClassLoss(Protocol):
    def __call__(self, logits: Tensor, labels: Tensor, quality: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Focal:
    """Focal loss with one-hot targets (Lin et al. 2017, section 3.2)."""

    alpha: float
    gamma: float

    def __call__(self, logits: Tensor, labels: Tensor, quality: Tensor) -> Tensor:
        target = _at_class(torch.ones_like(quality), logits, labels)
        return sigmoid_focal_loss(logits, target, self.alpha, self.gamma)


@dataclass(frozen=True)
class QualityFocal:
    """Focal loss whose target is the quality (Generalized Focal Loss, Li et al. 2020, eq. 2)."""

    beta: float

    def __call__(self, logits: Tensor, labels: Tensor, quality: Tensor) -> Tensor:
        target = _at_class(quality, logits, labels)
        cross_entropy = binary_cross_entropy_with_logits(logits, target, reduction="none")
        return (target - logits.sigmoid()).abs().pow(self.beta) * cross_entropy


@dataclass(frozen=True)
class Varifocal:
    """Target and weight of a positive are its quality q, negatives weigh alpha p^gamma (VarifocalNet, eq. 2).

    As in the equation, a positive whose box misses its object (q = 0) counts as a negative.
    """

    alpha: float
    gamma: float

    def __call__(self, logits: Tensor, labels: Tensor, quality: Tensor) -> Tensor:
        target = _at_class(quality, logits, labels)
        weight = target.where(target > 0, self.alpha * logits.sigmoid() ** self.gamma)
        return weight * binary_cross_entropy_with_logits(logits, target, reduction="none")


def _at_class(value: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """[..., K] like logits: the value in the label's column, 0 everywhere else and for background."""
    value = value.to(logits.dtype).where(labels >= 0, 0)
    return torch.zeros_like(logits).scatter(-1, labels.clamp(min=0)[..., None], value[..., None])
