"""What a card can do at best, measured: the limits that the kernels of deformable attention are held against."""

import statistics
from collections.abc import Callable

import torch
import triton
import triton.language as tl

BLOCK, ROUNDS = 32, 16
RESIDENT = 2**24  # bytes: in every L2 cache since Ampere's
NEAR = 2**14  # bytes: in every L1 cache


@triton.jit
def rows_kernel(rows, out, count, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROUNDS: tl.constexpr, ATOMIC: tl.constexpr):
    """Reads ROUNDS random rows for each of BLOCK lanes, or adds to them; `count` rows, a power of two."""
    lane, column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    row = (lane * 747796405) & (count - 1)
    total = tl.zeros([BLOCK, WIDTH], tl.float32)
    for _ in tl.static_range(ROUNDS):
        row = (row * 1664525 + 1013904223) & (count - 1)
        at = rows + row[:, None] * WIDTH + column[None, :]
        if ATOMIC:
            tl.atomic_add(at, total + 1, sem="relaxed")
        else:
            total += tl.load(at).to(tl.float32)
    if not ATOMIC:
        tl.store(out + lane, tl.sum(total, 1))


def seconds(job: Callable[[], object], repeats: int = 20) -> float:
    """The median, on the device, of `repeats` runs after three."""
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats + 3)]
    for begin, end in events:
        begin.record()
        job()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events[3:]) / 1e3


def rows_rate(dtype: torch.dtype, memory: int, atomic: bool, width: int = 32, programs: int = 2**15) -> float:
    """Bytes per second of random rows of `width` elements within `memory` bytes."""
    rows = torch.zeros(memory // dtype.itemsize, dtype=dtype, device="cuda")
    out = torch.empty(programs * BLOCK, device="cuda")
    count = rows.numel() // width
    took = seconds(
        lambda: rows_kernel[(programs,)](
            rows, out, count, WIDTH=width, BLOCK=BLOCK, ROUNDS=ROUNDS, ATOMIC=atomic, num_warps=4
        )
    )
    return programs * BLOCK * ROUNDS * width * dtype.itemsize / took


def copy_rate(size: int = 2**30) -> float:
    """Bytes per second read and written by a copy in device memory."""
    source, target = (torch.empty(size, dtype=torch.uint8, device="cuda").fill_(one) for one in (1, 0))
    return 2 * size / seconds(lambda: target.copy_(source))


def limits() -> dict[str, float]:
    """Bytes per second."""
    found = {"memory": copy_rate(), "atomics": rows_rate(torch.float32, RESIDENT, True)}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        found |= {f"L2, {name}": rows_rate(dtype, RESIDENT, False), f"L1, {name}": rows_rate(dtype, NEAR, False)}
    return found
