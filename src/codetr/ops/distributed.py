"""Normalisers that mean the same on one process and on many."""

import torch.distributed as dist
from torch import Tensor


def mean_over_processes(value: Tensor) -> Tensor:
    """The mean of a tensor over all processes, detached, as float32; `value` itself when there is one process.

    Stays on the device: no host synchronisation. Every process must call it equally often.
    """
    value = value.detach().float()
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        value = value.clone()
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value
