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
def log_sum_exp(logits, row, exists, LP: tl.constexpr, BLOCK_LP: tl.constexpr):
    """The logarithm of the sum of the exponentials of each row."""
    slot = tl.arange(0, BLOCK_LP)
    there = exists[:, None] & (slot < LP)[None, :]
    tile = tl.load(logits + row[:, None] * LP + slot[None, :], mask=there, other=0).to(tl.float32)
    tile = tl.where((slot < LP)[None, :], tile, -float("inf"))
    largest = tl.max(tile, 1)
    return largest + tl.log(tl.sum(tl.exp(tile - largest[:, None]), 1))


@triton.jit
def rule_of(reference, query, level, exists, height, width, L: tl.constexpr, P: tl.constexpr, FORM: tl.constexpr):
    """Centre and scale such that position = centre + offset * scale, for x and y: positions count cells, 0 is the
    centre of the first (Deformable DETR, appendix A.3 and A.4)."""
    if FORM == 0:
        x, y, scale_x, scale_y = 0.0, 0.0, width.to(tl.float32), height.to(tl.float32)
    else:
        at = reference + (query * L + level) * FORM
        x = tl.load(at, mask=exists, other=0).to(tl.float32) * width
        y = tl.load(at + 1, mask=exists, other=0).to(tl.float32) * height
        if FORM == 2:
            scale_x, scale_y = 1.0, 1.0
        else:
            scale_x = tl.load(at + 2, mask=exists, other=0).to(tl.float32) * (width * (0.5 / P))
            scale_y = tl.load(at + 3, mask=exists, other=0).to(tl.float32) * (height * (0.5 / P))
    return x - 0.5, y - 0.5, scale_x, scale_y


@triton.jit
def look_up(value, x, y, first, width, valid_height, valid_width, exists, channel, stride, D: tl.constexpr):
    """The four cells around a position (x, y) of the map that begins at cell `first`.

    Returns the fractions; the index of the upper left cell in the map extended by one to the left and above, -1 where
    none of the four is on the valid part; the values, [BLOCK_Q, BLOCK_D], 0 for a cell that is not; their addresses
    relative to `value`; and which of them there are. NaN is nowhere.
    """
    inside = (x > -1) & (y > -1) & (x < valid_width) & (y < valid_height)
    floor_x, floor_y = tl.floor(tl.where(inside, x, 0.0)), tl.floor(tl.where(inside, y, 0.0))
    fx, fy = tl.where(inside, x - floor_x, 0.0), tl.where(inside, y - floor_y, 0.0)
    x0, y0 = floor_x.to(tl.int32), floor_y.to(tl.int32)
    base = tl.where(inside, (y0 + 1) * (width + 1) + x0 + 1, -1)
    inside = inside & exists
    top, bottom = inside & (y0 >= 0), inside & (y0 + 1 < valid_height)
    left, right = x0 >= 0, x0 + 1 < valid_width
    m00, m01, m10, m11 = (
        (top & left)[:, None],
        (top & right)[:, None],
        (bottom & left)[:, None],
        (bottom & right)[:, None],
    )
    a00 = ((first + y0 * width + x0) * stride)[:, None] + channel[None, :]
    if channel.shape[0] != D:
        m00, m01 = m00 & (channel < D)[None, :], m01 & (channel < D)[None, :]
        m10, m11 = m10 & (channel < D)[None, :], m11 & (channel < D)[None, :]
    else:
        m00, m01 = m00.broadcast_to(a00.shape), m01.broadcast_to(a00.shape)
        m10, m11 = m10.broadcast_to(a00.shape), m11.broadcast_to(a00.shape)
    a01, a10 = a00 + stride, a00 + width * stride
    a11 = a10 + stride
    v00 = tl.load(value + a00, mask=m00, other=0).to(tl.float32)
    v01 = tl.load(value + a01, mask=m01, other=0).to(tl.float32)
    v10 = tl.load(value + a10, mask=m10, other=0).to(tl.float32)
    v11 = tl.load(value + a11, mask=m11, other=0).to(tl.float32)
    return fx, fy, base, v00, v01, v10, v11, a00, a01, a10, a11, m00, m01, m10, m11


@triton.jit
def put(tile, numbers, column):
    """One number for each row into a column."""
    return tl.where((tl.arange(0, tile.shape[1]) == column)[None, :], numbers[:, None], tile)


@triton.jit
def forward_kernel(
    value,
    valid_sizes,
    reference,
    offsets,
    logits,
    levels,
    output,
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
    valid_sizes += b * L * 2
    reference += b * Q * L * FORM
    offsets += b * Q * H * L * P * 2
    logits += b * Q * H * L * P
    output += b * Q * H * D
    total = 0.0
    if FORM != 0:
        total = log_sum_exp(logits, row, exists, L * P, BLOCK_LP)
    result = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for level in range(L):
        entry = levels + level * COLUMNS
        height, width, first = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
        valid_height, valid_width = height, width
        if PADDED:
            valid_height, valid_width = tl.load(valid_sizes + level * 2), tl.load(valid_sizes + level * 2 + 1)
        centre_x, centre_y, scale_x, scale_y = rule_of(reference, query, level, exists, height, width, L, P, FORM)
        at = (row * L + level) * P
        for point in tl.static_range(P):
            dx = tl.load(offsets + at * 2 + 2 * point, mask=exists, other=0).to(tl.float32)
            dy = tl.load(offsets + at * 2 + (2 * point + 1), mask=exists, other=0).to(tl.float32)
            weight = tl.load(logits + at + point, mask=exists, other=0).to(tl.float32)
            if FORM != 0:
                weight = tl.exp(weight - total)
            x, y = centre_x + dx * scale_x, centre_y + dy * scale_y
            fx, fy, _, v00, v01, v10, v11, _, _, _, _, _, _, _, _ = look_up(
                value, x, y, first, width, valid_height, valid_width, exists, channel, stride_s, D
            )
            lower = weight * fy
            upper = weight - lower
            result += (upper - upper * fx)[:, None] * v00
            result += (upper * fx)[:, None] * v01
            result += (lower - lower * fx)[:, None] * v10
            result += (lower * fx)[:, None] * v11
    mask = exists[:, None] & channels[None, :]
    tl.store(output + row[:, None] * D + channel[None, :], result.to(output.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(
    gradient,
    output,
    value,
    valid_sizes,
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

    BLOCK_D >= 3 * P + 4, see below. ATOMIC: that of value is added to g_value (float32, value's strides, zero before).
    Otherwise the base cell of each sample and the shares of its four corners are written to bases and shares, for
    `gather_kernel`.
    """
    b, h = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    query, exists = queries_of(tl.program_id(0), levels, Q, L, BLOCK_Q, TILE_WIDTH)
    row = query * H + h
    channel = tl.arange(0, BLOCK_D)
    channels = channel < D
    value += b * stride_b + h * stride_h
    g_value += b * stride_b + h * stride_h
    valid_sizes += b * L * 2
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
    total, mean = 0.0, 0.0
    if FORM != 0:
        total = log_sum_exp(logits, row, exists, L * P, BLOCK_LP)
        # What the softmax's Jacobian subtracts: the weighted mean of the weights' gradients, gradient . output.
        mean = tl.sum(g * tl.load(output + row[:, None] * D + channel[None, :], mask=mask, other=0).to(tl.float32), 1)
    for level in range(L):
        entry = levels + level * COLUMNS
        height, width, first = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
        valid_height, valid_width = height, width
        if PADDED:
            valid_height, valid_width = tl.load(valid_sizes + level * 2), tl.load(valid_sizes + level * 2 + 1)
        centre_x, centre_y, scale_x, scale_y = rule_of(reference, query, level, exists, height, width, L, P, FORM)
        at = (row * L + level) * P
        # What is found for each query is collected in the columns of a tile that lies in registers as values do: a
        # store of one number for each query would move it between threads, with barriers, twelve times a level.
        found = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
        g_cx = tl.zeros([BLOCK_Q], tl.float32)
        g_cy = tl.zeros([BLOCK_Q], tl.float32)
        g_w = tl.zeros([BLOCK_Q], tl.float32)
        g_h = tl.zeros([BLOCK_Q], tl.float32)
        for point in tl.static_range(P):
            dx = tl.load(offsets + at * 2 + 2 * point, mask=exists, other=0).to(tl.float32)
            dy = tl.load(offsets + at * 2 + (2 * point + 1), mask=exists, other=0).to(tl.float32)
            weight = tl.load(logits + at + point, mask=exists, other=0).to(tl.float32)
            if FORM != 0:
                weight = tl.exp(weight - total)
            x, y = centre_x + dx * scale_x, centre_y + dy * scale_y
            fx, fy, base, v00, v01, v10, v11, a00, a01, a10, a11, m00, m01, m10, m11 = look_up(
                value, x, y, first, width, valid_height, valid_width, exists, channel, stride_s, D
            )
            d00, d01, d10, d11 = tl.sum(g * v00, 1), tl.sum(g * v01, 1), tl.sum(g * v10, 1), tl.sum(g * v11, 1)
            upper, lower = d00 + fx * (d01 - d00), d10 + fx * (d11 - d10)
            g_weight = upper + fy * (lower - upper)
            g_x = weight * ((1 - fy) * (d01 - d00) + fy * (d11 - d10))  # per cell
            g_y = weight * (lower - upper)
            seen = base >= 0  # what is not seen may have a reference or an offset that is not finite
            g_dx, g_dy = tl.where(seen, g_x * scale_x, 0), tl.where(seen, g_y * scale_y, 0)
            if FORM != 0:
                g_weight = weight * (g_weight - mean)
            found = put(found, g_dx, 2 * point)
            found = put(found, g_dy, 2 * point + 1)
            found = put(found, g_weight, 2 * P + point)
            if OF_REFERENCE:
                g_cx += g_x
                g_cy += g_y
                g_w += tl.where(seen, g_x * dx, 0)
                g_h += tl.where(seen, g_y * dy, 0)
            lower = weight * fy
            upper = weight - lower
            w01, w11 = upper * fx, lower * fx
            w00, w10 = upper - w01, lower - w11
            if ATOMIC:
                tl.atomic_add(g_value + a00, w00[:, None] * g, mask=m00, sem="relaxed")
                tl.atomic_add(g_value + a01, w01[:, None] * g, mask=m01, sem="relaxed")
                tl.atomic_add(g_value + a10, w10[:, None] * g, mask=m10, sem="relaxed")
                tl.atomic_add(g_value + a11, w11[:, None] * g, mask=m11, sem="relaxed")
            else:
                base += tl.program_id(1) * num_bases + tl.load(entry + 4)
                tl.store(bases + at + point, tl.where(seen, base, -1), mask=exists)
                tl.store(shares + at * 4 + 4 * point, w00, mask=exists)
                tl.store(shares + at * 4 + (4 * point + 1), w01, mask=exists)
                tl.store(shares + at * 4 + (4 * point + 2), w10, mask=exists)
                tl.store(shares + at * 4 + (4 * point + 3), w11, mask=exists)
        columns = exists[:, None] & (channel < 2 * P)[None, :]
        place = (at * 2)[:, None] + channel[None, :]
        tl.store(g_offsets + place, found.to(g_offsets.dtype.element_ty), mask=columns)
        columns = exists[:, None] & ((channel >= 2 * P) & (channel < 3 * P))[None, :]
        place = (at - 2 * P)[:, None] + channel[None, :]
        tl.store(g_logits + place, found.to(g_logits.dtype.element_ty), mask=columns)
        if OF_REFERENCE:
            found = put(found, g_cx * width, 3 * P)
            found = put(found, g_cy * height, 3 * P + 1)
            if FORM == 4:
                found = put(found, g_w * (width * (0.5 / P)), 3 * P + 2)
                found = put(found, g_h * (height * (0.5 / P)), 3 * P + 3)
            columns = exists[:, None] & ((channel >= 3 * P) & (channel < 3 * P + FORM))[None, :]
            place = ((row * L + level) * FORM - 3 * P)[:, None] + channel[None, :]
            tl.store(g_reference + place, found, mask=columns)


@triton.jit
def gather_kernel(
    gradient,
    valid_sizes,
    levels,
    order,
    starts,
    shares,
    g_value,
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
    width, first_cell, first_base, valid_height, valid_width, valid = 1, 0, 0, 0, 0, True
    for level in range(L):
        entry = levels + level * COLUMNS
        here = cell >= tl.load(entry + 2)
        if PADDED:
            size = valid_sizes + (b * L + level) * 2
            valid_height, valid_width = (
                tl.where(here, tl.load(size), valid_height),
                tl.where(here, tl.load(size + 1), valid_width),
            )
        width = tl.where(here, tl.load(entry + 1), width)
        first_cell = tl.where(here, tl.load(entry + 2), first_cell)
        first_base = tl.where(here, tl.load(entry + 4), first_base)
    y, x = (cell - first_cell) // width, (cell - first_cell) % width
    if PADDED:
        valid = (y < valid_height) & (x < valid_width)
    base = tl.program_id(1) * num_bases + first_base + (y + 1) * (width + 1) + x + 1
    result = tl.zeros([BLOCK_D], tl.float32)
    for number in tl.static_range(4):
        source = starts + base - number // 2 * (width + 1) - number % 2
        begin, end = tl.load(source), tl.load(source + 1)
        end = tl.where(valid, end, begin)
        for place in range(begin, end, BLOCK_N):
            exists = place + lane < end
            sample = tl.load(order + place + lane, mask=exists, other=0)
            share = tl.load(shares + sample * 4 + number, mask=exists, other=0)
            at = sample[:, None] // (L * P) * D + channel[None, :]
            g = tl.load(gradient + at, mask=exists[:, None] & channels[None, :], other=0).to(tl.float32)
            result += tl.sum(share[:, None] * g, 0)
    g_value += b * stride_b + cell.to(tl.int64) * stride_s + h * stride_h
    tl.store(g_value + channel, result.to(g_value.dtype.element_ty), mask=channels)
