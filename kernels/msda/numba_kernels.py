# mypy: ignore-errors
"""Multi-scale deformable attention for the CPU: the kernels, compiled by Numba at the first call and cached on disk.

A task is one (image, head). It first copies the head's channels into a map of its own, with zeros around every level
and in place of padding: then the four corners of a sample need no checks, and the rows of one head lie together.
One code serves both forms of `Inputs`: in cells, every sample is at centre + scale * offset.

All that is compiled is in this file and in vector.py: the cache looks at no other (see compiled.py).
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numba
import numpy as np
from numba import njit

from ..common.compiled import compiled
from ..common.vector import dot, exp_below, filled, largest, load, load_some, multiply_add, prefetch, store

ROWS_AHEAD = 8  # to prefetch: 3 to 16 are as good
LINE = LANES = 16  # floats in a cache line, and of slots computed at once

ZERO, HALF, ONE, LOWEST = np.float32(0), np.float32(0.5), np.float32(1), np.float32(-math.inf)

# No nnan or ninf: comparisons must see NaN.
OPTIONS: dict[str, Any] = {"fastmath": {"reassoc", "contract"}, "error_model": "numpy", "nogil": True}


class Kernels(NamedTuple):
    forward: Callable[..., None]
    backward: Callable[..., None]


@njit(forceinline=True, **OPTIONS)
def _pack(b, h, S, H, value, sizes, levels, maps, like):
    """The channels of a head into its map. What is not written (borders, padding) is the same for all heads."""
    for level in range(len(levels)):
        width, token, cell = levels[level, 1], levels[level, 2], levels[level, 3]
        for i in range(sizes[b, level, 0]):
            for j in range(sizes[b, level, 1]):
                source = (b * S + token + i * width + j) * H + h
                store(maps, cell + (i + 1) * (width + 1) + j + 1, load(value, source, like))


@njit(forceinline=True, **OPTIONS)
def _unpack(b, h, S, H, maps, sizes, levels, g_value, zero):
    for level in range(len(levels)):
        height, width, token, cell = levels[level, 0], levels[level, 1], levels[level, 2], levels[level, 3]
        for i in range(height):
            for j in range(width):
                inside = i < sizes[b, level, 0] and j < sizes[b, level, 1]
                row = load(maps, cell + (i + 1) * (width + 1) + j + 1, zero) if inside else zero
                store(g_value, (b * S + token + i * width + j) * H + h, row)


@njit(forceinline=True, **OPTIONS)
def _prefetch(row, count, array):
    """A row of `count` elements. Rows of one head lie H rows apart: too far for the processor to guess."""
    for i in range(row * count, (row + 1) * count, LINE):
        prefetch(array, i)


@njit(forceinline=True, **OPTIONS)
def _weigh(row, N, fused, logits, weights):
    """The weights of a (query, head): given, or the softmax over its slots."""
    zero, one = filled(ZERO, LANES), filled(ONE, LANES)
    top, total = LOWEST, ZERO
    for i in range(0, N, LANES):
        given = load_some(logits, row * N + i, N - i, LOWEST, zero)
        store(weights, i // LANES, given)
        top = max(top, largest(given))
    if fused:
        for i in range((N + LANES - 1) // LANES):
            powers = exp_below(load(weights, i, zero), top)
            store(weights, i, powers)
            total += dot(powers, one)
        for i in range((N + LANES - 1) // LANES):
            store(weights, i, multiply_add(ONE / total, load(weights, i, zero), zero))


@njit(forceinline=True, **OPTIONS)
def _view(q, level, P, levels, reference):
    """Of a query on a level, in cells of the map with its border: samples are at centre + scale * offset (x, y)."""
    h, w = np.float32(levels[level, 0]), np.float32(levels[level, 1])
    if reference.shape[1] == 0:
        return HALF, HALF, w, h
    i = q * len(levels) + level
    x, y = reference[i, 0] * w + HALF, reference[i, 1] * h + HALF
    if reference.shape[1] == 2:
        return x, y, ONE, ONE
    return x, y, reference[i, 2] * w * (HALF / np.float32(P)), reference[i, 3] * h * (HALF / np.float32(P))


@njit(forceinline=True, **OPTIONS)
def _place(x, y, level, levels):
    """The cell to the upper left, or -1 outside, and the fractions beyond it."""
    height, width = levels[level, 0], levels[level, 1]
    if x > 0 and y > 0 and x < np.float32(width + 1) and y < np.float32(height + 1):  # not if NaN
        column, line = int(x), int(y)
        return levels[level, 3] + line * (width + 1) + column, x - np.float32(column), y - np.float32(line)
    return -1, ZERO, ZERO


@njit(forceinline=True, **OPTIONS)
def _gather(q, row, P, levels, reference, offsets, weights, maps, zero):
    """What a (query, head) sees."""
    total, slot = zero, 0
    for level in range(len(levels)):
        centre_x, centre_y, scale_x, scale_y = _view(q, level, P, levels, reference)
        below = levels[level, 1] + 1
        for _ in range(P):
            i = 2 * (row * len(levels) * P + slot)
            x, y = centre_x + scale_x * offsets[i], centre_y + scale_y * offsets[i + 1]
            cell, right, bottom = _place(x, y, level, levels)
            if cell >= 0:
                left, bottom = ONE - right, weights[slot] * bottom
                top = weights[slot] - bottom
                total = multiply_add(top * left, load(maps, cell, zero), total)
                total = multiply_add(top * right, load(maps, cell + 1, zero), total)
                total = multiply_add(bottom * left, load(maps, cell + below, zero), total)
                total = multiply_add(bottom * right, load(maps, cell + below + 1, zero), total)
            slot += 1
    return total


@njit(forceinline=True, **OPTIONS)
def _scatter(g, cell, below, right, bottom, weight, maps, g_maps):
    """Backward of one sample: adds to the map's gradient, returns those of x and y (in cells) and of the weight."""
    left, top = ONE - right, ONE - bottom
    d00, d01 = dot(g, load(maps, cell, g)), dot(g, load(maps, cell + 1, g))
    d10, d11 = dot(g, load(maps, cell + below, g)), dot(g, load(maps, cell + below + 1, g))
    g_x = weight * (top * (d01 - d00) + bottom * (d11 - d10))
    g_y = weight * (left * (d10 - d00) + right * (d11 - d01))
    g_weight = top * (left * d00 + right * d01) + bottom * (left * d10 + right * d11)
    top, bottom = weight * top, weight * bottom
    store(g_maps, cell, multiply_add(top * left, g, load(g_maps, cell, g)))
    store(g_maps, cell + 1, multiply_add(top * right, g, load(g_maps, cell + 1, g)))
    store(g_maps, cell + below, multiply_add(bottom * left, g, load(g_maps, cell + below, g)))
    store(g_maps, cell + below + 1, multiply_add(bottom * right, g, load(g_maps, cell + below + 1, g)))
    return g_x, g_y, g_weight


@njit(forceinline=True, **OPTIONS)
def _scatter_row(q, row, g, P, levels, reference, offsets, weights, maps, g_maps, g_reference, g_offsets, g_logits):
    """Backward of a (query, head)."""
    N, slot, mean = len(levels) * P, 0, ZERO
    for level in range(len(levels)):
        centre_x, centre_y, scale_x, scale_y = _view(q, level, P, levels, reference)
        x_sum = y_sum = x_moment = y_moment = ZERO
        for _ in range(P):
            i = 2 * (row * N + slot)
            x, y = centre_x + scale_x * offsets[i], centre_y + scale_y * offsets[i + 1]
            cell, right, bottom = _place(x, y, level, levels)
            g_x = g_y = g_weight = ZERO
            if cell >= 0:
                weight = weights[slot]
                g_x, g_y, g_weight = _scatter(g, cell, levels[level, 1] + 1, right, bottom, weight, maps, g_maps)
                x_sum, x_moment = x_sum + g_x, x_moment + g_x * offsets[i]
                y_sum, y_moment = y_sum + g_y, y_moment + g_y * offsets[i + 1]
                mean += weight * g_weight
                g_x, g_y = g_x * scale_x, g_y * scale_y
            g_offsets[i], g_offsets[i + 1] = g_x, g_y
            g_logits[row * N + slot] = g_weight
            slot += 1
        if g_reference.shape[1] > 0:
            h, w, i = np.float32(levels[level, 0]), np.float32(levels[level, 1]), row * len(levels) + level
            g_reference[i, 0], g_reference[i, 1] = x_sum * w, y_sum * h
            if g_reference.shape[1] > 2:
                g_reference[i, 2] = x_moment * w * (HALF / np.float32(P))
                g_reference[i, 3] = y_moment * h * (HALF / np.float32(P))
    if reference.shape[1] > 0:  # through the softmax
        for slot in range(N):
            g_logits[row * N + slot] = weights[slot] * (g_logits[row * N + slot] - mean)


@cache
def kernels(channels: int) -> Kernels:
    """Compiles for a number of channels per head, or loads from Numba's cache (see README.md)."""
    D = channels  # a constant to the compiler

    def msda_forward(
        begin, end, parts, S, Q, H, P, value, sizes, levels, reference, offsets, logits, output, weights, maps
    ):
        zero, N = filled(ZERO, D), len(levels) * P
        for task in range(begin, end):
            b, h, part = task // parts // H, task // parts % H, task % parts
            if task == begin or (h == 0 and part == 0):
                maps[:] = ZERO
            if task == begin or part == 0:
                _pack(b, h, S, H, value, sizes, levels, maps, zero)
            for q in range(b * Q + Q * part // parts, b * Q + Q * (part + 1) // parts):
                row = q * H + h
                _prefetch(row + ROWS_AHEAD * H, N, logits)
                _prefetch(row + ROWS_AHEAD * H, 2 * N, offsets)
                _weigh(row, N, reference.shape[1] > 0, logits, weights)
                store(output, row, _gather(q, row, P, levels, reference, offsets, weights, maps, zero))

    def msda_backward(
        begin, end, S, Q, H, P, value, sizes, levels, reference, offsets, logits, gradient,
        g_value, g_reference, g_offsets, g_logits, weights, maps, g_maps,
    ):  # fmt: skip
        zero, N = filled(ZERO, D), len(levels) * P
        for task in range(begin, end):
            b, h = task // H, task % H
            if task == begin or h == 0:
                maps[:] = ZERO
            _pack(b, h, S, H, value, sizes, levels, maps, zero)
            g_maps[:] = ZERO
            for q in range(b * Q, (b + 1) * Q):
                row = q * H + h
                ahead = row + ROWS_AHEAD * H
                _prefetch(ahead, N, logits)
                _prefetch(ahead, N, g_logits)
                _prefetch(ahead, 2 * N, offsets)
                _prefetch(ahead, 2 * N, g_offsets)
                _prefetch(ahead, D, gradient)
                _weigh(row, N, reference.shape[1] > 0, logits, weights)
                g = load(gradient, row, zero)
                _scatter_row(
                    q, row, g, P, levels, reference, offsets, weights, maps, g_maps, g_reference, g_offsets, g_logits
                )
            _unpack(b, h, S, H, g_maps, sizes, levels, g_value, zero)

    n, flat, pairs = numba.int64, numba.float32[::1], numba.float32[:, ::1]
    inputs = (flat, n[:, :, ::1], n[:, ::1], pairs, flat, flat)
    forward = numba.void(*(n,) * 7, *inputs, flat, flat, flat)
    backward = numba.void(*(n,) * 6, *inputs, flat, flat, pairs, flat, flat, flat, flat, flat)
    return Kernels(compiled(msda_forward, forward, **OPTIONS), compiled(msda_backward, backward, **OPTIONS))
