"""Multi-scale deformable attention for the CPU, compiled by Numba at the first call and cached on disk.

Kernels are specialised for the number of channels per head: with a constant trip count LLVM vectorises the inner
loops. No two parallel tasks write to the same place and each sums in a fixed order, so results are the same bits
on every run and for every number of threads.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

QUERIES_PER_TASK = 128

# No nnan or ninf: comparisons must see NaN. Reassociation is what vectorises the dot products.
OPTIONS: dict[str, Any] = {"fastmath": {"reassoc", "contract"}, "error_model": "numpy", "nogil": True}


class Kernels(NamedTuple):
    forward: Callable[..., None]
    backward: Callable[..., None]


@njit(forceinline=True, **OPTIONS)
def _add(row, factor, other, channels):  # type: ignore[no-untyped-def]
    for c in range(channels):
        row[c] += factor * other[c]


@njit(forceinline=True, **OPTIONS)
def _axis(position, size):  # type: ignore[no-untyped-def]
    """Along one axis: the two cells around a position, whether each is inside (1 or 0), and the fraction.

    A cell outside is replaced by its neighbour inside, which is read anyway: no branches, no reads out of bounds.
    """
    first = int(np.floor(position))
    fraction = position - np.float32(first)
    has_first = np.float32(first >= 0)
    has_second = np.float32(first + 1 < size)
    return max(first, 0), min(first + 1, size - 1), has_first, has_second, fraction


@cache
def kernels(channels: int) -> Kernels:
    """Compiles for a number of channels per head, or loads from Numba's cache (see README.md)."""
    D = channels  # a constant to the compiler

    def msda_forward(value, shapes, locations, weights, output):  # type: ignore[no-untyped-def]
        B, Q, H, L, P, _ = locations.shape
        chunks = (Q + QUERIES_PER_TASK - 1) // QUERIES_PER_TASK
        for task in prange(B * H * chunks):
            b, h, begin = task // (H * chunks), task // chunks % H, task % chunks * QUERIES_PER_TASK
            for q in range(begin, min(begin + QUERIES_PER_TASK, Q)):
                total = output[b, q, h]
                for c in range(D):
                    total[c] = np.float32(0)
                start = 0
                for level in range(L):
                    height, width = shapes[level, 0], shapes[level, 1]
                    for p in range(P):
                        x = locations[b, q, h, level, p, 0] * np.float32(width) - np.float32(0.5)
                        y = locations[b, q, h, level, p, 1] * np.float32(height) - np.float32(0.5)
                        if x > -1 and y > -1 and x < width and y < height:  # not if NaN
                            x0, x1, in_x0, in_x1, fx = _axis(x, width)
                            y0, y1, in_y0, in_y1, fy = _axis(y, height)
                            top = weights[b, q, h, level, p] * in_y0 * (np.float32(1) - fy)
                            bottom = weights[b, q, h, level, p] * in_y1 * fy
                            left, right = in_x0 * (np.float32(1) - fx), in_x1 * fx
                            w00, w01, w10, w11 = top * left, top * right, bottom * left, bottom * right
                            v00, v01 = value[b, start + y0 * width + x0, h], value[b, start + y0 * width + x1, h]
                            v10, v11 = value[b, start + y1 * width + x0, h], value[b, start + y1 * width + x1, h]
                            for c in range(D):
                                total[c] += w00 * v00[c] + w01 * v01[c] + w10 * v10[c] + w11 * v11[c]
                    start += height * width

    def msda_backward(gradient, value, shapes, locations, weights, g_value, g_locations, g_weights):  # type: ignore[no-untyped-def]
        B, Q, H, L, P, _ = locations.shape
        for task in prange(B * H):
            b, h = task // H, task % H
            for s in range(value.shape[1]):
                for c in range(D):
                    g_value[b, s, h, c] = np.float32(0)
            for q in range(Q):
                g = gradient[b, q, h]
                start = 0
                for level in range(L):
                    height, width = shapes[level, 0], shapes[level, 1]
                    for p in range(P):
                        x = locations[b, q, h, level, p, 0] * np.float32(width) - np.float32(0.5)
                        y = locations[b, q, h, level, p, 1] * np.float32(height) - np.float32(0.5)
                        if x > -1 and y > -1 and x < width and y < height:  # not if NaN
                            x0, x1, in_x0, in_x1, fx = _axis(x, width)
                            y0, y1, in_y0, in_y1, fy = _axis(y, height)
                            left, right = in_x0 * (np.float32(1) - fx), in_x1 * fx
                            top, bottom = in_y0 * (np.float32(1) - fy), in_y1 * fy
                            s00, s01 = start + y0 * width + x0, start + y0 * width + x1
                            s10, s11 = start + y1 * width + x0, start + y1 * width + x1
                            v00, v01, v10, v11 = value[b, s00, h], value[b, s01, h], value[b, s10, h], value[b, s11, h]
                            d00 = d01 = d10 = d11 = np.float32(0)
                            for c in range(D):
                                d00 += g[c] * v00[c]
                                d01 += g[c] * v01[c]
                                d10 += g[c] * v10[c]
                                d11 += g[c] * v11[c]
                            w = weights[b, q, h, level, p]
                            g_x = top * (in_x1 * d01 - in_x0 * d00) + bottom * (in_x1 * d11 - in_x0 * d10)
                            g_y = left * (in_y1 * d10 - in_y0 * d00) + right * (in_y1 * d11 - in_y0 * d01)
                            g_w = top * (left * d00 + right * d01) + bottom * (left * d10 + right * d11)
                            g_locations[b, q, h, level, p, 0] = w * g_x * np.float32(width)
                            g_locations[b, q, h, level, p, 1] = w * g_y * np.float32(height)
                            g_weights[b, q, h, level, p] = g_w
                            _add(g_value[b, s00, h], w * top * left, g, D)
                            _add(g_value[b, s01, h], w * top * right, g, D)
                            _add(g_value[b, s10, h], w * bottom * left, g, D)
                            _add(g_value[b, s11, h], w * bottom * right, g, D)
                        else:
                            g_locations[b, q, h, level, p, 0] = np.float32(0)
                            g_locations[b, q, h, level, p, 1] = np.float32(0)
                            g_weights[b, q, h, level, p] = np.float32(0)
                    start += height * width

    f = numba.float32
    v, s, l, w = f[:, :, :, ::1], numba.int64[:, ::1], f[:, :, :, :, :, ::1], f[:, :, :, :, ::1]  # noqa: E741
    compile = partial(njit, parallel=True, cache=True, **OPTIONS)
    return Kernels(
        compile(numba.void(v, s, l, w, v))(msda_forward), compile(numba.void(v, v, s, l, w, v, l, w))(msda_backward)
    )


def forward(value: Tensor, spatial_shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """Shapes as in `msda_reference`; float32 or narrower. Computes in float32, returns value's dtype."""
    output = torch.empty(value.shape[0], locations.shape[1], *value.shape[2:])
    inputs = _array(value), np.array(spatial_shapes, dtype=np.int64), _array(locations), _array(weights)
    _use_threads_of_torch()
    kernels(value.shape[3]).forward(*inputs, output.numpy())
    return output.flatten(2).to(value.dtype)


def backward(
    gradient: Tensor, value: Tensor, spatial_shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients with respect to value, locations and weights, each in its tensor's dtype."""
    grads = [torch.empty(t.shape) for t in (value, locations, weights)]
    gradient = gradient.unflatten(2, value.shape[2:])
    inputs = _array(value), np.array(spatial_shapes, dtype=np.int64), _array(locations), _array(weights)
    _use_threads_of_torch()
    kernels(value.shape[3]).backward(_array(gradient), *inputs, *(g.numpy() for g in grads))
    return grads[0].to(value.dtype), grads[1].to(locations.dtype), grads[2].to(weights.dtype)


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().to(torch.float32).contiguous().numpy()


def _use_threads_of_torch() -> None:
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
