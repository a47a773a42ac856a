"""Rows by index, and indices of rows."""

import torch
from torch import Tensor

from codetr.ops.export_form import becomes_onnx


def take(x: Tensor, index: Tensor) -> Tensor:
    """[B, N, D], [B, n] -> [B, n, D]."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def largest(values: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest of the last dimension, largest first: [..., N] -> [..., min(count, N)].

    Of equal ones those that come first, where `topk` chooses by the tensor's shape, and so by an image's batch mates.
    Equal is what float32 does not tell apart, except for float64, which takes longer; NaN is larger than all.

    An exported graph takes `count` of them: its shapes do not follow from the image's, which must have so many.
    """
    if not torch.compiler.is_exporting():
        count = min(count, values.shape[-1])
    if values.dtype == torch.float64:
        return values.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    numbers = values.detach().float().nan_to_num(torch.inf, torch.inf, -torch.inf) + 0.0  # -0.0 becomes 0.0
    if becomes_onnx():  # whose TopK takes the first of equal ones, and which knows no bits of numbers
        return numbers.topk(count).indices
    bits = numbers.contiguous().view(torch.int32).long()  # in the order of the numbers, backwards if negative
    ranks = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    places = torch.arange(values.shape[-1], device=values.device)
    return ((ranks << 32) - places).topk(count).indices


def smallest(values: Tensor, count: int) -> Tensor:
    """As `largest`, for the smallest, smallest first; NaN is smaller than all."""
    return largest(-values, count)
