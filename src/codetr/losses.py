"""Losses that torch and torchvision lack."""

from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits


def quality_focal_loss(logits: Tensor, targets: Tensor, beta: float = 2.0) -> Tensor:
    """Focal loss for soft targets (Generalized Focal Loss, Li et al. 2020, eq. 2), elementwise.

    logits, targets: the same shape; a target is the quality (IoU) in [0, 1] of the true class, 0 elsewhere.
    """
    cross_entropy = binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return (targets - logits.sigmoid()).abs().pow(beta) * cross_entropy
