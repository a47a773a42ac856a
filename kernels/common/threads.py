"""Kernels on threads: not Numba's own, whose OpenMP pool competes with PyTorch's, and whose workqueue is not thread
safe."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise

import torch


def share_out(
    kernel: Callable[..., None], tasks: int, threads: int, arguments: tuple, scratch: tuple[int, ...]
) -> None:
    """Runs kernel(begin, end, *arguments, *scratch) over all tasks on so many threads, this one included.

    The kernel must release the GIL. scratch: the sizes of the float32 arrays that every thread gets for itself.
    """
    ends = [tasks * (i + 1) // threads for i in range(threads)]
    own = [[torch.empty(size).numpy() for size in scratch] for _ in ends]  # aligned to cache lines
    others = [
        _pool().submit(kernel, begin, end, *arguments, *arrays)
        for (begin, end), arrays in zip(pairwise(ends), own[1:], strict=True)
    ]
    kernel(0, ends[0], *arguments, *own[0])
    for other in others:
        other.result()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="kernels")


# A forked child inherits the pool without its threads.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)
