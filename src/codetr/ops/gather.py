"""Rows by index, per image."""

from torch import Tensor


def take(x: Tensor, index: Tensor) -> Tensor:
    """[B, N, D], [B, n] -> [B, n, D]."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
