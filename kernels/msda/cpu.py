"""Multi-scale deformable attention for the CPU: PyTorch's tensors to the kernels of numba_kernels.py, on threads.

No two tasks write to the same place and each sums in a fixed order, so the result is the same to the bit on every
run, for every number of threads.
"""

import math
from functools import reduce
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from ..common.threads import share_out
from .inputs import Gradients, Inputs, Shapes
from .numba_kernels import LANES, kernels

SAMPLES_PER_THREAD = 8192  # below, another thread costs more than it brings


def forward(inputs: Inputs) -> Tensor:
    """[B, Q, H * D] in value's dtype. Computes in float32."""
    B, S, H, D = inputs.value.shape
    _, Q, _, L, P, _ = inputs.offsets.shape
    output = torch.empty(B, Q, H * D)
    threads = _threads(inputs)
    parts = threads // math.gcd(threads, max(1, B * H))  # of the queries, where that makes equal shares
    levels, cells = _levels(inputs.spatial_shapes)
    arguments = parts, S, Q, H, P, *_arrays(inputs, levels), _flat(output)
    share_out(kernels(D).forward, B * H * parts, threads, arguments, (L * P + LANES, cells * D))
    return output.to(inputs.value.dtype)


def backward(gradient: Tensor, output: Tensor, inputs: Inputs, of_reference: bool) -> Gradients:
    """Gradients of the inputs, for that of the output."""
    value, _, reference, offsets, logits, _ = inputs
    B, S, H, D = value.shape
    _, Q, _, L, P, _ = offsets.shape
    coordinates = reference.shape[-1] if reference is not None and of_reference else 0
    g_value, g_offsets, g_logits = (torch.empty(t.shape) for t in (value, offsets, logits))
    g_reference = torch.empty(B, Q, H, L, coordinates)  # a part for each head
    found = _flat(g_value), _rows(g_reference), _flat(g_offsets), _flat(g_logits)
    levels, cells = _levels(inputs.spatial_shapes)
    arguments = S, Q, H, P, *_arrays(inputs, levels), _flat(gradient), *found
    threads = min(_threads(inputs), max(1, B * H))
    share_out(kernels(D).backward, B * H, threads, arguments, (L * P + LANES, cells * D, cells * D))
    total = None
    if reference is not None and of_reference:
        total = reduce(torch.add, g_reference.unbind(2)).to(reference.dtype)
    return Gradients(g_value.to(value.dtype), g_offsets.to(offsets.dtype), g_logits.to(logits.dtype), total)


def _levels(shapes: Shapes) -> tuple[np.ndarray, int]:
    """Per level (height, width, first token, first cell of its map), and the cells of all maps.

    The border's column between two lines of a map serves both.
    """
    tokens = accumulate((h * w for h, w in shapes), initial=0)
    cells = list(accumulate(((h + 2) * (w + 1) + 1 for h, w in shapes), initial=0))
    rows = [(*shape, *firsts) for shape, *firsts in zip(shapes, tokens, cells, strict=False)]
    return np.array(rows, dtype=np.int64).reshape(-1, 4), cells[-1]


def _arrays(inputs: Inputs, levels: np.ndarray) -> tuple[np.ndarray, ...]:
    value, _, reference, offsets, logits, valid_sizes = inputs
    sizes = np.broadcast_to(levels[:, :2], (len(value), len(levels), 2))
    if valid_sizes is not None:
        sizes = np.minimum(sizes, valid_sizes.numpy())
    rows = np.empty((0, 0), np.float32) if reference is None else _rows(reference)
    return _flat(value), np.array(sizes, np.int64, order="C"), levels, rows, _flat(offsets), _flat(logits)


def _flat(tensor: Tensor) -> np.ndarray:
    return tensor.detach().to(torch.float32).contiguous().view(-1).numpy()


def _rows(tensor: Tensor) -> np.ndarray:
    return _flat(tensor).reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def _threads(inputs: Inputs) -> int:
    return max(1, min(torch.get_num_threads(), inputs.logits.numel() // SAMPLES_PER_THREAD))
