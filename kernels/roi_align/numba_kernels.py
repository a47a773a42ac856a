# mypy: ignore-errors
"""RoIAlign for the CPU: the kernels, compiled by Numba at the first call and cached on disk.

A sample's bilinear weight is a product of one along each axis, and so is the mean over a cell's samples: a region is
W_y F W_x^T, with a few non-zero weights per row of W_y and W_x (`_weigh_axis`). Features are packed by LANES channels,
so that a block of channels of one image is a small map of vectors.

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
from ..common.vector import filled, load, multiply_add, store

LANES = 32  # channels of a block (see README.md)
CHUNK = 64  # regions whose weights are kept: in all blocks of channels they are the same
MOST_SAMPLES = 1 << 24  # per cell and axis

ZERO, HALF, ONE = np.float32(0), np.float32(0.5), np.float32(1)

# No fast mathematics: coordinates must be torchvision's to the digit. Vectors have their own.
OPTIONS: dict[str, Any] = {"error_model": "numpy", "nogil": True}


class Kernels(NamedTuple):
    forward: Callable[..., None]
    backward: Callable[..., None]


@njit(forceinline=True, **OPTIONS)
def _samples(length, size, ratio):
    """Per cell along an axis: given, or as many as there are pixels beneath."""
    if ratio > 0:
        return ratio
    number = math.ceil(length / np.float32(size))
    return int(number) if number > 0 and number < MOST_SAMPLES else 0  # none if NaN


@njit(forceinline=True, **OPTIONS)
def _add(place, weight, begin, end, places, weights):
    """To the entry of this place, which is one of the last two, or to a new one. Returns the entries' end."""
    for i in range(max(begin, end - 2), end):
        if places[i] == place:
            weights[i] += weight
            return end
    places[end], weights[end] = place, weight
    return end + 1


@njit(forceinline=True, **OPTIONS)
def _weigh_axis(start, length, samples, extent, end, ends, places, weights):
    """One axis of a region: of which places of the map each of its cells is made. ends: where its entries end."""
    size = len(ends) - 1
    step = length / np.float32(size)
    ends[0] = end
    for cell in range(size):
        begin = end
        for i in range(samples):
            x = start + np.float32(cell) * step + (np.float32(i) + HALF) * step / np.float32(samples)
            if x >= -1 and x <= extent:  # not if NaN
                low = min(int(max(x, ZERO)), extent - 1)
                high = min(low + 1, extent - 1)
                share = max(x, ZERO) - np.float32(low) if high > low else ZERO
                end = _add(low, ONE - share, begin, end, places, weights)
                end = _add(high, share, begin, end, places, weights)
        ends[cell + 1] = end
    return end


@njit(forceinline=True, **OPTIONS)
def _weigh(r, i, end, ratio, maps, scales, numbers, boxes, ends, places, weights, factors):
    """Both axes of region r, number i of the chunk, and the factor of its sums: one over the samples of a cell."""
    level = numbers[r]
    scale, height, width = scales[level], maps[level, 0], maps[level, 1]
    size = ends.shape[2] - 1
    left, top = boxes[r, 0] * scale - HALF, boxes[r, 1] * scale - HALF
    w, h = boxes[r, 2] * scale - HALF - left, boxes[r, 3] * scale - HALF - top
    columns, rows = _samples(w, size, ratio), _samples(h, size, ratio)
    if height == 0 or width == 0:
        columns = rows = 0
    factors[i] = ONE / np.float32(max(columns * rows, 1))
    end = _weigh_axis(left, w, columns, width, end, ends[i, 1], places, weights)
    return _weigh_axis(top, h, rows, height, end, ends[i, 0], places, weights)


@njit(forceinline=True, **OPTIONS)
def _gather(map_, width, packed, ends, places, weights, tile, lines):
    """A region in a block of channels. tile: its cells. lines: W_x of two lines of the map, the odd and the even one;
    neighbouring cells share them."""
    zero, size = filled(ZERO, LANES), ends.shape[1] - 1
    even, odd = -1, -1  # lines of the map that are kept
    for i in range(size):
        for j in range(size):
            store(tile, i * size + j, zero)
        for entry in range(ends[0, i], ends[0, i + 1]):
            y = places[entry]
            kept = (y & 1) * size
            if y != (odd if y & 1 else even):
                for j in range(size):
                    total = zero
                    for e in range(ends[1, j], ends[1, j + 1]):
                        total = multiply_add(weights[e], load(packed, map_ + y * width + places[e], zero), total)
                    store(lines, kept + j, total)
                if y & 1:
                    odd = y
                else:
                    even = y
            for j in range(size):
                cell = i * size + j
                store(tile, cell, multiply_add(weights[entry], load(lines, kept + j, zero), load(tile, cell, zero)))


@njit(forceinline=True, **OPTIONS)
def _spread_line(y, map_, width, kept, packed, ends, places, weights, lines):
    """Adds the gradient of a line, and forgets it."""
    zero, size = filled(ZERO, LANES), ends.shape[1] - 1
    for j in range(size):
        g = load(lines, kept + j, zero)
        for e in range(ends[1, j], ends[1, j + 1]):
            place = map_ + y * width + places[e]
            store(packed, place, multiply_add(weights[e], g, load(packed, place, zero)))
        store(lines, kept + j, zero)


@njit(forceinline=True, **OPTIONS)
def _scatter(map_, width, packed, ends, places, weights, tile, lines):
    """The transpose of `_gather`: adds the gradient of a region's cells to that of the map."""
    zero, size = filled(ZERO, LANES), ends.shape[1] - 1
    even, odd = -1, -1
    for j in range(2 * size):
        store(lines, j, zero)
    for i in range(size):
        for entry in range(ends[0, i], ends[0, i + 1]):
            y = places[entry]
            kept = (y & 1) * size
            other = odd if y & 1 else even
            if y != other:
                if other >= 0:
                    _spread_line(other, map_, width, kept, packed, ends, places, weights, lines)
                if y & 1:
                    odd = y
                else:
                    even = y
            for j in range(size):
                g = load(tile, i * size + j, zero)
                store(lines, kept + j, multiply_add(weights[entry], g, load(lines, kept + j, zero)))
    if even >= 0:
        _spread_line(even, map_, width, 0, packed, ends, places, weights, lines)
    if odd >= 0:
        _spread_line(odd, map_, width, size, packed, ends, places, weights, lines)


@njit(forceinline=True, **OPTIONS)
def _tables(size, ratio, maps):
    """For the weights of a chunk. A cell is made of every place of an axis at the most, or of two for each sample."""
    most = 2 * ratio
    for level in range(len(maps)):
        most = max(most, maps[level, 0] + 1, maps[level, 1] + 1)
    entries = CHUNK * 2 * size * most
    ends = np.empty((CHUNK, 2, size + 1), np.int64)
    return ends, np.empty(entries, np.int32), np.empty(entries, np.float32), np.empty(CHUNK, np.float32)


@cache
def kernels() -> Kernels:
    """Compiles, or loads from Numba's cache (see README.md). One code serves every number of channels and cells."""

    def roi_align_forward(
        begin, end, C, K, S, size, ratio, packed, maps, scales, images, numbers, boxes, output, tile, lines
    ):
        """A task is a region."""
        ends, places, weights, factors = _tables(size, ratio, maps)
        cells = size * size
        for first in range(begin, end, CHUNK):
            last, used = min(first + CHUNK, end), 0
            for r in range(first, last):
                if numbers[r] >= 0:
                    used = _weigh(
                        r, r - first, used, ratio, maps, scales, numbers, boxes, ends, places, weights, factors
                    )
            for k in range(K):
                for r in range(first, last):
                    i, out = r - first, (r * C + k * LANES) * cells
                    count = min(LANES, C - k * LANES)
                    if numbers[r] < 0:
                        output[out : out + count * cells] = ZERO
                        continue
                    map_ = (images[r] * K + k) * S + maps[numbers[r], 2]
                    _gather(map_, maps[numbers[r], 1], packed, ends[i], places, weights, tile, lines)
                    for c in range(count):
                        for cell in range(cells):
                            output[out + c * cells + cell] = factors[i] * tile[cell * LANES + c]

    def roi_align_backward(
        begin, end, C, K, S, size, ratio, packed, maps, scales, images, numbers, boxes, gradient, tile, lines
    ):
        """A task is a block of channels of an image; those of one image share the weights of its regions."""
        ends, places, weights, factors = _tables(size, ratio, maps)
        chosen, cells = np.empty(CHUNK, np.int64), size * size
        packed[begin * S * LANES : end * S * LANES] = ZERO
        tile[:] = ZERO
        for b in range(begin // K, (end + K - 1) // K):
            r = 0
            while r < len(images):
                count, used = 0, 0
                while r < len(images) and count < CHUNK:
                    if images[r] == b and numbers[r] >= 0:
                        used = _weigh(
                            r, count, used, ratio, maps, scales, numbers, boxes, ends, places, weights, factors
                        )
                        chosen[count] = r
                        count += 1
                    r += 1
                for task in range(max(begin, b * K), min(end, (b + 1) * K)):
                    k = task - b * K
                    channels = min(LANES, C - k * LANES)
                    for i in range(count):
                        source, level = (chosen[i] * C + k * LANES) * cells, numbers[chosen[i]]
                        for c in range(channels):
                            for cell in range(cells):
                                tile[cell * LANES + c] = factors[i] * gradient[source + c * cells + cell]
                        map_ = task * S + maps[level, 2]
                        _scatter(map_, maps[level, 1], packed, ends[i], places, weights, tile, lines)

    n, flat = numba.int64, numba.float32[::1]
    inputs = (flat, n[:, ::1], flat, n[::1], n[::1], numba.float32[:, ::1])
    signature = numba.void(*(n,) * 7, *inputs, flat, flat, flat)
    return Kernels(
        compiled(roi_align_forward, signature, **OPTIONS), compiled(roi_align_backward, signature, **OPTIONS)
    )
