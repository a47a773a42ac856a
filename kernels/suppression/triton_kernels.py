"""Greedy suppression of sorted candidates: what overlaps what, as bits; then one walk along them."""

import triton
import triton.language as tl

WORD = tl.constexpr(32)  # candidates in a word of bits


@triton.jit
def _read(boxes, groups, at, N):
    """Corners and group of the candidates `at`; beyond the last a group that none has."""
    known = at < N
    x1, y1 = tl.load(boxes + at * 4, known, 0.0), tl.load(boxes + at * 4 + 1, known, 0.0)
    x2, y2 = tl.load(boxes + at * 4 + 2, known, 0.0), tl.load(boxes + at * 4 + 3, known, 0.0)
    return x1, y1, x2, y2, tl.load(groups + at, known, -1)


@triton.jit(do_not_specialize=["N", "words"])
def overlap_kernel(boxes, groups, bits, N, words, iou, ROWS: tl.constexpr):
    """A program: whether each of ROWS candidates would suppress each of the 32 of a word.

    boxes: [B, N, 4] xyxy. groups: [B, N]. bits: [B, N, words] int32, the result, where the word is not before the row's
    own; bit k of word w is candidate 32 w + k, never one before the row. words: ceil(N / 32).
    """
    image, word = tl.program_id(2).to(tl.int64), tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    if (word + 1) * WORD > tl.program_id(0) * ROWS:
        lane = tl.arange(0, WORD)
        column = word * WORD + lane
        ax1, ay1, ax2, ay2, a_group = _read(boxes + image * N * 4, groups + image * N, row, N)
        bx1, by1, bx2, by2, b_group = _read(boxes + image * N * 4, groups + image * N, column, N)
        width = tl.minimum(ax2[:, None], bx2[None]) - tl.maximum(ax1[:, None], bx1[None])
        height = tl.minimum(ay2[:, None], by2[None]) - tl.maximum(ay1[:, None], by1[None])
        both = tl.maximum(width, 0.0) * tl.maximum(height, 0.0)
        either = ((ax2 - ax1) * (ay2 - ay1))[:, None] + ((bx2 - bx1) * (by2 - by1))[None] - both
        over = (tl.div_rn(both, either) > iou) & (a_group[:, None] == b_group[None]) & (row[:, None] < column[None])
        packed = tl.sum(over.to(tl.int32) << lane[None], 1)
        tl.store(bits + (image * N + row) * words + word, packed, row < N)


@triton.jit
def _or(a, b):
    return a | b


@triton.jit(do_not_specialize=["N", "words"])
def walk_kernel(bits, kept, N, words, BLOCK: tl.constexpr):
    """A program walks over the candidates of an image, a word at a time.

    bits: as above. kept: [B, N] bool, the result. BLOCK: a power of two, at least `words`.
    """
    image = tl.program_id(0).to(tl.int64)
    bits += image * N * words
    kept += image * N
    lane, block = tl.arange(0, WORD), tl.arange(0, BLOCK)
    gone = tl.zeros([BLOCK], tl.int32)
    for word in range(words):
        own = tl.sum(tl.where(block == word, gone, 0), 0)
        for k in tl.static_range(32):
            row = word * WORD + k
            found = tl.load(bits + row * words + word, row < N, 0)
            own |= tl.where((own >> k) & 1 != 0, 0, found)
        row = word * WORD + lane
        stays = (row < N) & ((own >> lane) & 1 == 0)
        tl.store(kept + row, stays, row < N)
        asked = stays[:, None] & (block > word)[None] & (block < words)[None]
        rows = tl.load(bits + row[:, None] * words + block[None], asked, 0)
        gone |= tl.reduce(rows, 0, _or)
