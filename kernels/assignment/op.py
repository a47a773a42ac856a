"""The op `codetr::assign`: on CUDA a Triton kernel for which the host never waits, elsewhere scipy."""

import importlib.util

import torch
from torch import Tensor

from .host import solve


@torch.library.custom_op("codetr::assign", mutates_args=())
def assign(costs: Tensor, counts: Tensor, repeats: int) -> Tensor:
    """The cheapest one-to-one assignment of queries to objects, of every problem.

    costs: [P, M, N] float32; what is not finite counts as 1e9. counts: [P] int64 on the same device, the problem's
    number of objects, its first rows. repeats: how many queries every object gets. With more (repeated) objects than
    queries the cheapest of them are served. Returns [P, N] int64: the object that owns each query, -1 for none.
    """
    return solve(costs, counts, repeats)


@assign.register_fake
def _(costs, counts, repeats) -> Tensor:  # type: ignore[no-untyped-def]
    return counts.new_empty(costs.shape[0], costs.shape[2])


def _solve_on_device(costs: Tensor, counts: Tensor, repeats: int) -> Tensor:
    if torch.version.hip or torch.cuda.get_device_capability(costs.device) < (8, 0):
        return solve(costs, counts, repeats)  # Triton needs Ampere or newer; on ROCm the kernel was never tried
    from . import gpu  # Triton is not loaded before it is needed

    return gpu.solve(costs, counts, repeats)


if importlib.util.find_spec("triton") is not None:
    assign.register_kernel("cuda")(_solve_on_device)
