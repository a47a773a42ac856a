"""RoIAlign for the CPU: PyTorch's tensors to the kernels of numba_kernels.py, on threads.

No two tasks write to the same place and each sums in a fixed order, so the result is the same to the bit on every
run, for every number of threads.
"""

from collections.abc import Callable
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from ..common.threads import share_out
from .inputs import Regions
from .numba_kernels import LANES, kernels

NUMBERS_PER_THREAD = 32768  # of the result; below, another thread costs more than it brings


def forward(levels: list[Tensor], regions: Regions) -> Tensor:
    """[R, C, size, size], float32."""
    C, size = levels[0].shape[1], regions.size
    output = torch.empty(len(regions.images), C, size, size)
    sizes = [(level.shape[2], level.shape[3]) for level in levels]
    _run(kernels().forward, len(output), _packed(levels), sizes, C, regions, output)
    return output


def backward(
    gradient: Tensor, sizes: list[tuple[int, int]], batch: int, channels_last: bool, regions: Regions
) -> list[Tensor]:
    """gradient: [R, C, size, size]. sizes: (H_j, W_j). Returns [B, C, H_j, W_j] for each, float32."""
    C, cells = gradient.shape[1], [height * width for height, width in sizes]
    packed = torch.empty(batch, -(-C // LANES), sum(cells), LANES)
    flat = gradient.detach().to(torch.float32).contiguous()
    _run(kernels().backward, packed.shape[0] * packed.shape[1], packed, sizes, C, regions, flat)
    order = torch.channels_last if channels_last else torch.contiguous_format
    parts = zip(packed.split(cells, 2), sizes, strict=True)
    return [_unpacked(part.unflatten(2, shape), C, order) for part, shape in parts]


def _run(
    kernel: Callable[..., None],
    tasks: int,
    packed: Tensor,
    sizes: list[tuple[int, int]],
    channels: int,
    regions: Regions,
    pooled: Tensor,
) -> None:
    """packed: the maps or their gradient. pooled: the result or its gradient."""
    size, (blocks, cells) = regions.size, packed.shape[1:3]
    firsts = accumulate((height * width for height, width in sizes), initial=0)
    maps = np.array([(*shape, first) for shape, first in zip(sizes, firsts, strict=False)], dtype=np.int64)
    scales = np.array([1 / stride for stride in regions.strides], dtype=np.float32)
    images, level_of = (t.contiguous().numpy() for t in (regions.images, regions.level_of))
    boxes = regions.boxes.detach().to(torch.float32).contiguous().numpy()
    arguments = channels, blocks, cells, size, regions.sampling_ratio, packed.view(-1).numpy(), maps, scales
    arguments += images, level_of, boxes, pooled.view(-1).numpy()
    threads = max(1, min(torch.get_num_threads(), tasks, pooled.numel() // NUMBERS_PER_THREAD))
    share_out(kernel, tasks, threads, arguments, (size * size * LANES, 2 * size * LANES))


def _packed(levels: list[Tensor]) -> Tensor:
    """[B, C, H_j, W_j] -> [B, blocks, cells of all, LANES] float32; channels beyond C are zero."""
    (B, C), cells = levels[0].shape[:2], [level.shape[2] * level.shape[3] for level in levels]
    blocks = -(-C // LANES)
    packed = torch.empty(B, blocks, sum(cells), LANES)
    for level, part in zip(levels, packed.split(cells, 2), strict=True):
        whole = pad(level.detach(), (0, 0, 0, 0, 0, blocks * LANES - C)).unflatten(1, (blocks, LANES))
        part.unflatten(2, level.shape[2:]).copy_(whole.permute(0, 1, 3, 4, 2))
    return packed


def _unpacked(part: Tensor, channels: int, order: torch.memory_format) -> Tensor:
    """[B, blocks, H, W, LANES] -> [B, C, H, W] of its own."""
    B, blocks, H, W, _ = part.shape
    level = torch.empty(B, blocks * LANES, H, W, memory_format=order)
    level.unflatten(1, (blocks, LANES)).copy_(part.permute(0, 1, 4, 2, 3))
    return level if channels == blocks * LANES else level[:, :channels].clone(memory_format=order)
