"""Box arithmetic that torchvision lacks: inverse sigmoid, reference refinement, IoU of pairs."""

import torch
from torch import Tensor


def inverse_sigmoid(x: Tensor, eps: float) -> Tensor:
    """Logit of `x` clamped to [0, 1], with both arguments of the logarithm at least `eps`."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


def refine(reference: Tensor, delta: Tensor, eps: float) -> Tensor:
    """Iterative box refinement (Deformable DETR, appendix A.4): add `delta` in logit space.

    reference: [..., 2 or 4] after the sigmoid; a 2-d reference shifts only the centre. delta: [..., 4].
    """
    shift = inverse_sigmoid(reference, eps)
    if reference.shape[-1] == 2:
        shift = torch.cat([shift, torch.zeros_like(shift)], -1)
    return (delta + shift).sigmoid()


def aligned_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU of corresponding xyxy boxes: [..., 4], [..., 4] -> [...]."""
    overlap = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - overlap
    return overlap / union.clamp(min=1e-6)
