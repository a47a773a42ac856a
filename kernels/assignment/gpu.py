"""Launches the kernel. With TRITON_INTERPRET=1, set before Triton is imported, it runs on the CPU."""

import torch
import triton
from torch import Tensor

from .triton_kernels import assignment_kernel

PER_THREAD = 4  # places, so that what is known of them stays in registers
MOST_WARPS = 32


def solve(costs: Tensor, counts: Tensor, repeats: int) -> Tensor:
    """As `assign`."""
    problems, M, N = costs.shape
    owners = counts.new_full((problems, N), -1)
    if owners.numel() and M:
        block = triton.next_power_of_2(max(N, M * repeats))
        with torch.cuda.device_of(costs):
            assignment_kernel[(problems,)](
                costs.contiguous(), counts.contiguous(), owners, M, N, repeats, BLOCK=block, num_warps=warps(block)
            )
    return owners


def warps(block: int) -> int:
    """Of a program with so many places."""
    return min(max(block // (32 * PER_THREAD), 1), MOST_WARPS)
