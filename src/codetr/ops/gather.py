"""Rows by index, and indices of rows."""

import torch
from torch import Tensor


def take(x: Tensor, index: Tensor) -> Tensor:
    """[B, N, D], [B, n] -> [B, n, D]."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def smallest(values: Tensor, count: int) -> Tensor:
    """Indices of the `count` smallest of the last dimension, smallest first: [..., N] -> [..., min(count, N)].

    values: not negative; compared in float32. Of equal ones those that come first, where `topk` chooses by the tensor's
    shape, and so by an image's batch mates.
    """
    bits = values.float().contiguous().view(torch.int32).long()  # in the order of the numbers, if none is negative
    places = torch.arange(values.shape[-1], device=values.device)
    return ((bits << 32) | places).topk(min(count, values.shape[-1]), largest=False).indices
