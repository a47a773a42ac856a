"""The Triton kernels: what one program does. README.md has the mathematics, gpu.py the launches.

A program owns BLOCK_Q queries of one (image, head) pair; rows of a tile are queries, columns are channels. Everything
is computed in float32, whatever the inputs are. FORM says what `reference` holds: 0 nothing (offsets are locations,
logits are weights), 2 points, 4 boxes. `levels` is the table that `gpu.level_table` makes. Within an image every
index fits into 32 bits (gpu.py checks).
"""

import triton
import triton.language as tl

COLUMNS = tl.constexpr(5)  # of the level table: height, width, first cell, first tile, first base cell


@triton.jit
def queries_of(program, levels, Q, L: tl.constexpr, BLOCK_Q: tl.constexpr, TILE_WIDTH: tl.constexpr):
    """The queries of a program, and which of them exist: consecutive ones; or, with TILE_WIDTH and one query per cell
    of the maps, a tile of neighbours, which look at much the same cells."""
    lane = tl.arange(0, BLOCK_Q)
    if TILE_WIDTH == 0:
        query = program * BLOCK_Q + lane
        exists = query < Q
    else:
        TILE_HEIGHT: tl.constexpr = BLOCK_Q // TILE_WIDTH
        height, width, first_cell, first_tile = 0, 1, 0, 0
        for level in range(L):
            entry = levels + level * COLUMNS
            here = program >= tl.load(entry + 3)
            height = tl.where(here, tl.load(entry), height)
            width = tl.where(here, tl.load(entry + 1), width)
            first_cell = tl.where(here, tl.load(entry + 2), first_cell)
            first_tile = tl.where(here, tl.load(entry + 3), first_tile)
        tile, across = program - first_tile, tl.cdiv(width, TILE_WIDTH)
        y = tile // across * TILE_HEIGHT + lane // TILE_WIDTH
        x = tile % across * TILE_WIDTH + lane % TILE_WIDTH
        query = first_cell + y * width + x
        exists = (y < height) & (x < width)
    return query, exists


@triton.jit
def softmax_statistics(logits, row, exists, LP: tl.constexpr, BLOCK_LP: tl.constexpr):
    """The largest logit of each row, and the sum of exp(logit - largest)."""
    slot = tl.arange(0, BLOCK_LP)
    there = exists[:, None] & (slot < LP)[None, :]
    tile = tl.load(logits + row[:, None] * LP + slot[None, :], mask=there, other=0).to(tl.float32)
    tile = tl.where((slot < LP)[None, :], tile, -float("inf"))
    largest = tl.max(tile, 1)
    return largest, tl.sum(tl.exp(tile - largest[:, None]), 1)


@triton.jit
def reference_of(reference, query, level, exists, L: tl.constexpr, FORM: tl.constexpr):
    """cx, cy, w, h of the queries' references on a level; 0 where there is none."""
    cx, cy, w, h = 0.0, 0.0, 0.0, 0.0
    if FORM != 0:
        at = reference + (query * L + level) * FORM
        cx = tl.load(at, mask=exists, other=0).to(tl.float32)
        cy = tl.load(at + 1, mask=exists, other=0).to(tl.float32)
    if FORM == 4:
        w = tl.load(at + 2, mask=exists, other=0).to(tl.float32)
        h = tl.load(at + 3, mask=exists, other=0).to(tl.float32)
    return cx, cy, w, h


@triton.jit
def position_of(offset, centre, extent, size, P: tl.constexpr, FORM: tl.constexpr):
    """Along one axis, in cells, 0 at the centre of the first (Deformable DETR, appendix A.3 and A.4)."""
    if FORM == 0:
        position = offset * size
    elif FORM == 2:
        position = centre * size + offset
    else:
        position = (centre + offset * (0.5 / P) * extent) * size
    return position - 0.5


@triton.jit
def look_up(value, padding, x, y, first, height, width, exists, channel, channels, stride, PADDED: tl.constexpr):
    """The four cells around a position (x, y) of the map that begins at cell `first`.

    Returns the fractions; the index of the upper left cell in the map extended by one to the left and above, -1 where
    none of the four is on the map; the values, [BLOCK_Q, BLOCK_D], 0 for a cell off the map or padded; the address of
    the upper left one relative to `value`; and which of them there are. NaN is nowhere.
    """
    inside = (x > -1) & (y > -1) & (x < width) & (y < height)
    floor_x, floor_y = tl.floor(tl.where(inside, x, 0.0)), tl.floor(tl.where(inside, y, 0.0))
    fx, fy = tl.where(inside, x - floor_x, 0.0), tl.where(inside, y - floor_y, 0.0)
    x0, y0 = floor_x.to(tl.int32), floor_y.to(tl.int32)
    base = tl.where(inside, (y0 + 1) * (width + 1) + x0 + 1, -1)
    inside = inside & exists
    top, bottom = inside & (y0 >= 0), inside & (y0 + 1 < height)
    left, right = x0 >= 0, x0 + 1 < width
    m00, m01, m10, m11 = top & left, top & right, bottom & left, bottom & right
    cell = first + y0 * width + x0
    if PADDED:
        m00 = m00 & (tl.load(padding + cell, mask=m00, other=1) == 0)
        m01 = m01 & (tl.load(padding + cell + 1, mask=m01, other=1) == 0)
        m10 = m10 & (tl.load(padding + cell + width, mask=m10, other=1) == 0)
        m11 = m11 & (tl.load(padding + cell + width + 1, mask=m11, other=1) == 0)
    at = (cell * stride)[:, None] + channel[None, :]
    below = at + width * stride
    m00, m01 = m00[:, None] & channels[None, :], m01[:, None] & channels[None, :]
    m10, m11 = m10[:, None] & channels[None, :], m11[:, None] & channels[None, :]
    v00 = tl.load(value + at, mask=m00, other=0).to(tl.float32)
    v01 = tl.load(value + at + stride, mask=m01, other=0).to(tl.float32)
    v10 = tl.load(value + below, mask=m10, other=0).to(tl.float32)
    v11 = tl.load(value + below + stride, mask=m11, other=0).to(tl.float32)
    return fx, fy, base, v00, v01, v10, v11, at, below, m00, m01, m10, m11


@triton.jit
def forward_kernel(
    value,
    padding,
    reference,
    offsets,
    logits,
    levels,
    output,
    S,
    Q,
    stride_b,
    stride_s,
    stride_h,
    H: tl.constexpr,
    D: tl.constexpr,
    L: tl.constexpr,
    P: tl.constexpr,
    FORM: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_LP: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
):
    """output[b, q, h] = sum over levels and points of weight * bilinear sample."""
    b, h = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    query, exists = queries_of(tl.program_id(0), levels, Q, L, BLOCK_Q, TILE_WIDTH)
    row = query * H + h
    channel = tl.arange(0, BLOCK_D)
    channels = channel < D
    value += b * stride_b + h * stride_h
    padding += b * S
    reference += b * Q * L * FORM
    offsets += b * Q * H * L * P * 2
    logits += b * Q * H * L * P
    output += b * Q * H * D
    largest, total = 0.0, 1.0
    if FORM != 0:
        largest, total = softmax_statistics(logits, row, exists, L * P, BLOCK_LP)
    result = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for level in range(L):
        entry = levels + level * COLUMNS
        height, width, first = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
        cx, cy, box_w, box_h = reference_of(reference, query, level, exists, L, FORM)
        for point in tl.static_range(P):
            slot = (row * L + level) * P + point
            dx = tl.load(offsets + slot * 2, mask=exists, other=0).to(tl.float32)
            dy = tl.load(offsets + slot * 2 + 1, mask=exists, other=0).to(tl.float32)
            weight = tl.load(logits + slot, mask=exists, other=0).to(tl.float32)
            if FORM != 0:
                weight = tl.exp(weight - largest) / total
            x = position_of(dx, cx, box_w, width, P, FORM)
            y = position_of(dy, cy, box_h, height, P, FORM)
            fx, fy, _, v00, v01, v10, v11, _, _, _, _, _, _ = look_up(
                value, padding, x, y, first, height, width, exists, channel, channels, stride_s, PADDED
            )
            upper, lower = weight * (1 - fy), weight * fy
            result += (upper * (1 - fx))[:, None] * v00 + (upper * fx)[:, None] * v01
            result += (lower * (1 - fx))[:, None] * v10 + (lower * fx)[:, None] * v11
    mask = exists[:, None] & channels[None, :]
    tl.store(output + row[:, None] * D + channel[None, :], result.to(output.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(
    gradient,
    output,
    value,
    padding,
    reference,
    offsets,
    logits,
    levels,
    g_value,
    g_reference,
    g_offsets,
    g_logits,
    bases,
    shares,
    S,
    Q,
    num_bases,
    stride_b,
    stride_s,
    stride_h,
    H: tl.constexpr,
    D: tl.constexpr,
    L: tl.constexpr,
    P: tl.constexpr,
    FORM: tl.constexpr,
    PADDED: tl.constexpr,
    OF_REFERENCE: tl.constexpr,
    ATOMIC: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_LP: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
):
    """Every gradient of a block of queries. g_reference: [B, Q, H, L, FORM], a part per head.

    ATOMIC: that of value is added to g_value (float32, value's strides, zero before). Otherwise the base cell of each
    sample and the shares of its four corners are written to bases and shares, for `gather_kernel`.
    """
    b, h = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    query, exists = queries_of(tl.program_id(0), levels, Q, L, BLOCK_Q, TILE_WIDTH)
    row = query * H + h
    channel = tl.arange(0, BLOCK_D)
    channels = channel < D
    value += b * stride_b + h * stride_h
    g_value += b * stride_b + h * stride_h
    padding += b * S
    reference += b * Q * L * FORM
    g_reference += b * Q * H * L * FORM
    offsets += b * Q * H * L * P * 2
    g_offsets += b * Q * H * L * P * 2
    logits += b * Q * H * L * P
    g_logits += b * Q * H * L * P
    bases += b * Q * H * L * P
    shares += b * Q * H * L * P * 4
    gradient += b * Q * H * D
    output += b * Q * H * D
    mask = exists[:, None] & channels[None, :]
    g = tl.load(gradient + row[:, None] * D + channel[None, :], mask=mask, other=0).to(tl.float32)
    largest, total, mean = 0.0, 1.0, 0.0
    if FORM != 0:
        largest, total = softmax_statistics(logits, row, exists, L * P, BLOCK_LP)
        # What the softmax's Jacobian subtracts: the weighted mean of the weights' gradients, gradient . output.
        mean = tl.sum(g * tl.load(output + row[:, None] * D + channel[None, :], mask=mask, other=0).to(tl.float32), 1)
    for level in range(L):
        entry = levels + level * COLUMNS
        height, width, first = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
        cx, cy, box_w, box_h = reference_of(reference, query, level, exists, L, FORM)
        g_cx = tl.zeros([BLOCK_Q], tl.float32)
        g_cy = tl.zeros([BLOCK_Q], tl.float32)
        g_w = tl.zeros([BLOCK_Q], tl.float32)
        g_h = tl.zeros([BLOCK_Q], tl.float32)
        for point in tl.static_range(P):
            slot = (row * L + level) * P + point
            dx = tl.load(offsets + slot * 2, mask=exists, other=0).to(tl.float32)
            dy = tl.load(offsets + slot * 2 + 1, mask=exists, other=0).to(tl.float32)
            weight = tl.load(logits + slot, mask=exists, other=0).to(tl.float32)
            if FORM != 0:
                weight = tl.exp(weight - largest) / total
            x = position_of(dx, cx, box_w, width, P, FORM)
            y = position_of(dy, cy, box_h, height, P, FORM)
            fx, fy, base, v00, v01, v10, v11, at, below, m00, m01, m10, m11 = look_up(
                value, padding, x, y, first, height, width, exists, channel, channels, stride_s, PADDED
            )
            d00, d01, d10, d11 = tl.sum(g * v00, 1), tl.sum(g * v01, 1), tl.sum(g * v10, 1), tl.sum(g * v11, 1)
            upper, lower = d00 + fx * (d01 - d00), d10 + fx * (d11 - d10)
            g_weight = upper + fy * (lower - upper)
            g_x = weight * ((1 - fy) * (d01 - d00) + fy * (d11 - d10))  # per cell
            g_y = weight * (lower - upper)
            if FORM == 0:
                g_dx, g_dy = g_x * width, g_y * height
            elif FORM == 2:
                g_dx, g_dy = g_x, g_y
            else:
                g_dx, g_dy = g_x * width * box_w * (0.5 / P), g_y * height * box_h * (0.5 / P)
            seen = base >= 0  # what is not may have a reference or an offset that is not finite
            tl.store(g_offsets + slot * 2, tl.where(seen, g_dx, 0).to(g_offsets.dtype.element_ty), mask=exists)
            tl.store(g_offsets + slot * 2 + 1, tl.where(seen, g_dy, 0).to(g_offsets.dtype.element_ty), mask=exists)
            if FORM != 0:
                g_weight = weight * (g_weight - mean)
            tl.store(g_logits + slot, g_weight.to(g_logits.dtype.element_ty), mask=exists)
            if OF_REFERENCE:
                g_cx += tl.where(seen, g_x * width, 0)
                g_cy += tl.where(seen, g_y * height, 0)
                g_w += tl.where(seen, g_x * width * dx * (0.5 / P), 0)
                g_h += tl.where(seen, g_y * height * dy * (0.5 / P), 0)
            upper, lower = weight * (1 - fy), weight * fy
            w00, w01, w10, w11 = upper * (1 - fx), upper * fx, lower * (1 - fx), lower * fx
            if ATOMIC:
                tl.atomic_add(g_value + at, w00[:, None] * g, mask=m00, sem="relaxed")
                tl.atomic_add(g_value + at + stride_s, w01[:, None] * g, mask=m01, sem="relaxed")
                tl.atomic_add(g_value + below, w10[:, None] * g, mask=m10, sem="relaxed")
                tl.atomic_add(g_value + below + stride_s, w11[:, None] * g, mask=m11, sem="relaxed")
            else:
                base += tl.program_id(1) * num_bases + tl.load(entry + 4)
                tl.store(bases + slot, tl.where(seen, base, -1), mask=exists)
                tl.store(shares + slot * 4, w00, mask=exists)
                tl.store(shares + slot * 4 + 1, w01, mask=exists)
                tl.store(shares + slot * 4 + 2, w10, mask=exists)
                tl.store(shares + slot * 4 + 3, w11, mask=exists)
        if OF_REFERENCE:
            at = g_reference + (row * L + level) * FORM
            tl.store(at, g_cx, mask=exists)
            tl.store(at + 1, g_cy, mask=exists)
            if FORM == 4:
                tl.store(at + 2, g_w, mask=exists)
                tl.store(at + 3, g_h, mask=exists)


@triton.jit
def gather_kernel(
    gradient,
    padding,
    levels,
    order,
    starts,
    shares,
    g_value,
    S,
    num_bases,
    stride_b,
    stride_s,
    stride_h,
    H: tl.constexpr,
    D: tl.constexpr,
    L: tl.constexpr,
    P: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The gradient of one cell of one (image, head): what every sample adds to it, always in the same order.

    order: the samples [B, Q, H, L, P] sorted by base cell. starts: where each base cell's begin among them. A cell is
    a corner of the samples of four base cells: its own, and those to the left, above, and both.
    """
    cell, b, h = tl.program_id(0), (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    channel, lane = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    channels = channel < D
    width, first_cell, first_base = 1, 0, 0
    for level in range(L):
        entry = levels + level * COLUMNS
        here = (cell >= tl.load(entry + 2)) & (tl.load(entry) > 0)
        width = tl.where(here, tl.load(entry + 1), width)
        first_cell = tl.where(here, tl.load(entry + 2), first_cell)
        first_base = tl.where(here, tl.load(entry + 4), first_base)
    y, x = (cell - first_cell) // width, (cell - first_cell) % width
    base = tl.program_id(1) * num_bases + first_base + (y + 1) * (width + 1) + x + 1
    result = tl.zeros([BLOCK_D], tl.float32)
    for number in tl.static_range(4):
        source = starts + base - number // 2 * (width + 1) - number % 2
        begin, end = tl.load(source), tl.load(source + 1)
        if PADDED:
            end = tl.where(tl.load(padding + b * S + cell) != 0, begin, end)
        for place in range(begin, end, BLOCK_N):
            exists = place + lane < end
            sample = tl.load(order + place + lane, mask=exists, other=0)
            share = tl.load(shares + sample * 4 + number, mask=exists, other=0)
            at = sample[:, None] // (L * P) * D + channel[None, :]
            g = tl.load(gradient + at, mask=exists[:, None] & channels[None, :], other=0).to(tl.float32)
            result += tl.sum(share[:, None] * g, 0)
    g_value += b * stride_b + cell.to(tl.int64) * stride_s + h * stride_h
    tl.store(g_value + channel, result.to(g_value.dtype.element_ty), mask=channels)
