"""Launches the kernels. With TRITON_INTERPRET=1, set before Triton is imported, they run on the CPU."""

import numpy as np
import torch
import triton
from torch import Tensor

from .triton_kernels import WORD, overlap_kernel, walk_kernel

ROWS = 128
WARPS = 4


def suppress(boxes: Tensor, scores: Tensor, groups: Tensor, iou: float) -> Tensor:
    """As `survivors`."""
    B, N = scores.shape
    order = scores.sort(dim=1, descending=True, stable=True).indices
    boxes = boxes.gather(1, order[..., None].expand(-1, -1, 4))
    groups = groups.gather(1, order)
    words = triton.cdiv(N, WORD.value)
    bits = torch.empty(B, N, words, dtype=torch.int32, device=boxes.device)
    kept = torch.empty_like(scores, dtype=torch.bool)
    if kept.numel():
        with torch.cuda.device_of(boxes):
            grid = (triton.cdiv(N, ROWS), words, B)
            overlap_kernel[grid](boxes, groups, bits, N, words, below(iou), ROWS=ROWS, num_warps=WARPS)
            walk_kernel[(B,)](bits, kept, N, words, BLOCK=triton.next_power_of_2(words), num_warps=WARPS)
    return torch.empty_like(kept).scatter_(1, order, kept)


def below(number: float) -> float:
    """The largest float32 that is not larger: a float32 is above the one exactly where it is above the other."""
    rounded = np.float32(number)
    return float(rounded if float(rounded) <= number else np.nextafter(rounded, np.float32(-np.inf)))
