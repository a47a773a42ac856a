"""Losses of single predictions: of boxes, and of classes.

The latter are each called with (logits [..., K], labels [...], quality [...]) -> [..., K], elementwise. labels: the
class, or -1 for background. quality: in [0, 1], the IoU of the predicted with the target box, without gradient; only
read where the label is a class. `Focal` does not read it at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torchvision.ops import sigmoid_focal_loss

EPS = 1e-7  # keeps the GIoU of boxes without area finite


def giou_loss(boxes: Tensor, targets: Tensor) -> Tensor:
    """1 - GIoU of corresponding xyxy boxes (Rezatofighi et al. 2019, algorithm 1): [..., 4], [..., 4] -> [...].

    The digits of torchvision's `generalized_box_iou_loss`, which makes the host wait: it indexes by a mask.
    """
    (low, high), (target_low, target_high) = boxes.split(2, -1), targets.split(2, -1)
    lows = torch.stack([torch.maximum(low, target_low), torch.minimum(low, target_low), low, target_low])
    highs = torch.stack([torch.minimum(high, target_high), torch.maximum(high, target_high), high, target_high])
    width, height = (highs - lows).unbind(-1)
    overlap, hull, *areas = (width * height).unbind()
    intersection = overlap.where((width[0] > 0) & (height[0] > 0), 0)
    union = areas[0] + areas[1] - intersection
    return 1 - (intersection / (union + EPS) - (hull - union) / (hull + EPS))


def dice_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """1 - the Dice coefficient of masks at points, with 1 added above and below (Milletari et al. 2016, V-Net):
    [..., P], [..., P] in 0..1 -> [...]."""
    found = logits.sigmoid()
    return 1 - (2 * (found * targets).sum(-1) + 1) / (found.sum(-1) + targets.sum(-1) + 1)


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


class FedLoss(nn.Module):
    """Which classes a step's class loss counts: those of its objects, and others at random up to `classes` in all.

    For data sets whose images are labelled with some classes only, such as LVIS (federated loss: Zhou et al. 2021,
    Probabilistic two-stage detection). The others are drawn without replacement, with probabilities proportional to
    the number of training images with the class, to the `power`; `weigh` says those numbers, and a checkpoint keeps
    the weights. Every process draws its own, for its own objects.
    """

    weights: Tensor

    def __init__(self, classes: int, power: float) -> None:
        super().__init__()
        self.classes, self.power = classes, power
        self.register_buffer("weights", torch.empty(0))

    def weigh(self, image_counts: Sequence[int]) -> None:
        """image_counts: of label 0, 1, ..., the training images with such an object."""
        self.weights = torch.tensor(image_counts, dtype=torch.float32, device=self.weights.device) ** self.power

    def forward(self, labels: Tensor, valid: Tensor) -> Tensor:
        """[K] bool. labels: [B, M], int64; valid: [B, M] bool."""
        count = len(self.weights)
        labels = labels.where(valid, count).flatten()
        present = torch.zeros(count + 1, dtype=torch.bool, device=labels.device).index_fill(0, labels, True)[:-1]
        # The first to arrive, at rates that are the weights: a draw without replacement that no device waits for.
        arrivals = torch.empty_like(self.weights).exponential_() / self.weights
        first = arrivals.where(~present, -1).topk(min(self.classes, count), largest=False).indices
        return present.index_fill(0, first, True)


def _at_class(value: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """[..., K] like logits: the value in the label's column, 0 everywhere else and for background."""
    value = value.to(logits.dtype).where(labels >= 0, 0)
    return torch.zeros_like(logits).scatter(-1, labels.clamp(min=0)[..., None], value[..., None])
