"""The op `codetr::survivors`: on CUDA two Triton kernels for which the host never waits, elsewhere torchvision."""

import importlib.util

import torch
from torch import Tensor

from .host import suppress

MOST = 2**14  # candidates of an image: what overlaps what then has 32 MiB


@torch.library.custom_op("codetr::survivors", mutates_args=())
def survivors(boxes: Tensor, scores: Tensor, groups: Tensor, iou: float) -> Tensor:
    """Which candidates no better one of their group suppresses.

    boxes: [B, N, 4] xyxy float32. scores: [B, N] float32; of equal ones the first is better. groups: [B, N] int64.
    iou: suppress above it. A box without area neither suppresses nor is suppressed. Returns [B, N] bool.
    """
    return suppress(boxes, scores, groups, iou)


@survivors.register_fake
def _(boxes, scores, groups, iou) -> Tensor:  # type: ignore[no-untyped-def]
    return torch.empty_like(scores, dtype=torch.bool)


def _suppress_on_device(boxes: Tensor, scores: Tensor, groups: Tensor, iou: float) -> Tensor:
    """torchvision, and a wait, for more candidates than training has."""
    old = torch.version.hip or torch.cuda.get_device_capability(boxes.device) < (8, 0)
    if old or scores.shape[1] > MOST:
        return suppress(boxes, scores, groups, iou)
    from . import gpu  # Triton is not loaded before it is needed

    return gpu.suppress(boxes, scores, groups, iou)


if importlib.util.find_spec("triton") is not None:
    survivors.register_kernel("cuda")(_suppress_on_device)
