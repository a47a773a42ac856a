"""Multi-scale deformable attention for the CPU, compiled by Numba at the first call and cached on disk.

Kernels are specialised for the number of channels per head: with a constant trip count LLVM vectorises the inner
loops. Threads share out (image, head) pairs. No two of them write to the same place and each sums in a fixed order,
so the result is the same to the bit on every run, for every number of threads.
"""

import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from numba import njit
from torch import Tensor

from .inputs import Gradients, Inputs

log = logging.getLogger(__name__)

# Below this many samples per level another thread costs more than it brings.
SAMPLES_PER_THREAD = 2048

U = np.uintp  # unsigned indices need no check for negative ones
ZERO, HALF, ONE = np.float32(0), np.float32(0.5), np.float32(1)

# No nnan or ninf: comparisons must see NaN. Reassociation is what vectorises the dot products.
OPTIONS: dict[str, Any] = {"fastmath": {"reassoc", "contract"}, "error_model": "numpy", "nogil": True}


class Kernels(NamedTuple):
    forward: Callable[..., None]
    backward: Callable[..., None]


@njit(forceinline=True, **OPTIONS)
def _axis(position, size):  # type: ignore[no-untyped-def]
    """Along one axis: the two cells around a position, whether each is inside (1 or 0), and the fraction.

    A cell outside is replaced by its neighbour inside, which is read anyway: no branches, no reads out of bounds.
    """
    first = int(position) - int(position < 0)  # floor, for positions above -1
    has_first, has_second = np.float32(first >= 0), np.float32(first + 1 < size)
    return max(first, 0), min(first + 1, size - 1), has_first, has_second, position - np.float32(first)


@njit(forceinline=True, **OPTIONS)
def _add(target, row, factor, source, other, channels):  # type: ignore[no-untyped-def]
    for c in range(channels):
        target[row + c] += factor * source[other + c]


@cache
def kernels(channels: int) -> Kernels:
    """Compiles for a number of channels per head, or loads from Numba's cache (see README.md)."""
    D = U(channels)  # a constant to the compiler

    def msda_forward(begin, end, S, Q, H, P, value, shapes, locations, weights, output):  # type: ignore[no-untyped-def]
        stride = U(H) * D
        for task in range(begin, end):
            b, h = task // H, task % H
            for q in range(Q):
                row = U((b * Q + q) * H + h)
                out, slot = row * D, row * U(len(shapes) * P)
                for c in range(D):
                    output[out + c] = ZERO
                base = U(b * S) * stride + U(h) * D
                for level in range(len(shapes)):
                    height, width = shapes[level, 0], shapes[level, 1]
                    for _ in range(P):
                        x = locations[slot, 0] * np.float32(width) - HALF
                        y = locations[slot, 1] * np.float32(height) - HALF
                        if x > -1 and y > -1 and x < width and y < height:  # not if NaN
                            x0, x1, in_x0, in_x1, fx = _axis(x, width)
                            y0, y1, in_y0, in_y1, fy = _axis(y, height)
                            left, right = in_x0 * (ONE - fx), in_x1 * fx
                            top = weights[slot] * in_y0 * (ONE - fy)
                            bottom = weights[slot] * in_y1 * fy
                            w00, w01, w10, w11 = top * left, top * right, bottom * left, bottom * right
                            i00 = base + U(y0 * width + x0) * stride
                            i01 = base + U(y0 * width + x1) * stride
                            i10 = base + U(y1 * width + x0) * stride
                            i11 = base + U(y1 * width + x1) * stride
                            for c in range(D):
                                output[out + c] += (
                                    w00 * value[i00 + c]
                                    + w01 * value[i01 + c]
                                    + w10 * value[i10 + c]
                                    + w11 * value[i11 + c]
                                )
                        slot += U(1)
                    base += U(height * width) * stride

    def msda_backward(
        begin, end, S, Q, H, P, gradient, value, shapes, locations, weights, g_value, g_locations, g_weights
    ):  # type: ignore[no-untyped-def]
        stride = U(H) * D
        for task in range(begin, end):
            b, h = task // H, task % H
            origin = U(b * S) * stride + U(h) * D
            for s in range(U(S)):
                for c in range(D):
                    g_value[origin + s * stride + c] = ZERO
            for q in range(Q):
                row = U((b * Q + q) * H + h)
                g, slot = row * D, row * U(len(shapes) * P)
                base = origin
                for level in range(len(shapes)):
                    height, width = shapes[level, 0], shapes[level, 1]
                    for _ in range(P):
                        x = locations[slot, 0] * np.float32(width) - HALF
                        y = locations[slot, 1] * np.float32(height) - HALF
                        g_x = g_y = g_w = ZERO
                        if x > -1 and y > -1 and x < width and y < height:  # not if NaN
                            x0, x1, in_x0, in_x1, fx = _axis(x, width)
                            y0, y1, in_y0, in_y1, fy = _axis(y, height)
                            left, right = in_x0 * (ONE - fx), in_x1 * fx
                            top, bottom = in_y0 * (ONE - fy), in_y1 * fy
                            i00 = base + U(y0 * width + x0) * stride
                            i01 = base + U(y0 * width + x1) * stride
                            i10 = base + U(y1 * width + x0) * stride
                            i11 = base + U(y1 * width + x1) * stride
                            d00 = d01 = d10 = d11 = ZERO
                            for c in range(D):
                                d00 += gradient[g + c] * value[i00 + c]
                                d01 += gradient[g + c] * value[i01 + c]
                                d10 += gradient[g + c] * value[i10 + c]
                                d11 += gradient[g + c] * value[i11 + c]
                            w = weights[slot]
                            g_x = top * (in_x1 * d01 - in_x0 * d00) + bottom * (in_x1 * d11 - in_x0 * d10)
                            g_y = left * (in_y1 * d10 - in_y0 * d00) + right * (in_y1 * d11 - in_y0 * d01)
                            g_x, g_y = w * g_x * np.float32(width), w * g_y * np.float32(height)
                            g_w = top * (left * d00 + right * d01) + bottom * (left * d10 + right * d11)
                            _add(g_value, i00, w * top * left, gradient, g, D)
                            _add(g_value, i01, w * top * right, gradient, g, D)
                            _add(g_value, i10, w * bottom * left, gradient, g, D)
                            _add(g_value, i11, w * bottom * right, gradient, g, D)
                        g_locations[slot, 0] = g_x
                        g_locations[slot, 1] = g_y
                        g_weights[slot] = g_w
                        slot += U(1)
                    base += U(height * width) * stride

    n, f = numba.int64, numba.float32
    sizes, flat, shapes, locations = (n,) * 6, f[::1], n[:, ::1], f[:, ::1]
    forward = numba.void(*sizes, flat, shapes, locations, flat, flat)
    backward = numba.void(*sizes, flat, flat, shapes, locations, flat, flat, locations, flat)
    return Kernels(_compile(forward, msda_forward), _compile(backward, msda_backward))


def _compile(signature: Any, function: Callable[..., None]) -> Callable[..., None]:
    try:
        return njit(signature, cache=True, **OPTIONS)(function)
    except RuntimeError as error:  # no folder that Numba may write to
        log.warning("compiling %s without a cache (%s); set NUMBA_CACHE_DIR", function.__name__, error)
        return njit(signature, **OPTIONS)(function)


def forward(inputs: Inputs) -> Tensor:
    """[B, Q, H * D] in value's dtype. Computes in float32."""
    value, _, reference, locations, weights, padding = inputs
    if reference is not None or padding is not None:
        raise NotImplementedError("fused")
    sizes, shapes = _sizes(inputs)
    output = torch.empty(value.shape[0], locations.shape[1], value.shape[2] * value.shape[3])
    arrays = _flat(value), shapes, _flat(locations).reshape(-1, 2), _flat(weights), _flat(output)
    _share_out(kernels(value.shape[3]).forward, value.shape[0], sizes, arrays)
    return output.to(value.dtype)


def backward(gradient: Tensor, output: Tensor, inputs: Inputs, of_reference: bool) -> Gradients:
    """Gradients of the inputs, for that of the output."""
    value, _, _, locations, weights, _ = inputs
    sizes, shapes = _sizes(inputs)
    g_value, g_locations, g_weights = (torch.empty(t.shape) for t in (value, locations, weights))
    arrays = _flat(gradient), _flat(value), shapes, _flat(locations).reshape(-1, 2), _flat(weights)
    outputs = _flat(g_value), _flat(g_locations).reshape(-1, 2), _flat(g_weights)
    _share_out(kernels(value.shape[3]).backward, value.shape[0], sizes, (*arrays, *outputs))
    return Gradients(g_value.to(value.dtype), g_locations.to(locations.dtype), g_weights.to(weights.dtype), None)


def _sizes(inputs: Inputs) -> tuple[tuple[int, int, int, int], np.ndarray]:
    """(S, Q, H, P) and the level sizes."""
    _, S, H, _ = inputs.value.shape
    _, Q, _, _, P, _ = inputs.offsets.shape
    return (S, Q, H, P), np.array(inputs.spatial_shapes, dtype=np.int64).reshape(-1, 2)


def _flat(tensor: Tensor) -> np.ndarray:
    return tensor.detach().to(torch.float32).contiguous().view(-1).numpy()


def _share_out(kernel: Callable[..., None], images: int, sizes: tuple[int, int, int, int], arrays: tuple) -> None:
    """Runs the kernel on as many threads as PyTorch uses, this one included; the kernels release the GIL.

    Not Numba's own threads: its OpenMP pool competes with PyTorch's, and its workqueue is not thread safe.
    """
    _, Q, H, P = sizes
    tasks, samples = images * H, images * H * Q * P
    threads = max(1, min(torch.get_num_threads(), tasks, samples // SAMPLES_PER_THREAD))
    ends = [tasks * (i + 1) // threads for i in range(threads)]
    others = [_pool().submit(kernel, begin, end, *sizes, *arrays) for begin, end in pairwise(ends)]
    kernel(0, ends[0], *sizes, *arrays)
    for other in others:
        other.result()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="msda")


# A forked child inherits the pool without its threads.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)
