"""How much of value a program of the Triton kernels touches: a count without a GPU, which decides its queries' shape.

A program owns BLOCK_Q queries of one (image, head). What it reads twice it finds in the L1 cache, if that keeps it;
what another program has read comes from L2 again. So the bytes from L2 to L1 are at best the distinct rows (cells) of
each program: counted for strips of consecutive queries and for tiles of neighbours.
"""

import argparse
from collections.abc import Iterator
from datetime import date

import numpy as np
import torch
from codetr.kernels.msda.inputs import Shapes
from numpy.typing import NDArray
from rich.progress import track

from benchmarks import report
from benchmarks.attention.inputs import CASES, CHANNELS, HEADS, IMAGE, POINTS, Case, centres, initial_offsets

BLOCKS, WIDTHS = (16, 32, 64), (0, 4, 8, 16)
SPREADS = {"initial": 0.0, "+ noise of 2 cells": 2.0, "+ noise of 4 cells": 4.0}
Ints = NDArray[np.int64]


def programs(shapes: Shapes, block: int, width: int) -> Ints:
    """[programs, block] queries, -1 where a tile leaves its map; as `queries_of` of the kernels."""
    size = sum(height * columns for height, columns in shapes)
    if not width:
        queries = np.arange(-(-size // block) * block)
        return np.where(queries < size, queries, -1).reshape(-1, block)
    parts, first = [], 0
    for height, columns in shapes:
        tall = block // width
        down, across = -(-height // tall), -(-columns // width)
        cells = np.full((down * tall, across * width), -1)
        cells[:height, :columns] = first + np.arange(height * columns).reshape(height, columns)
        parts.append(cells.reshape(down, tall, across, width).swapaxes(1, 2).reshape(-1, block))
        first += height * columns
    return np.concatenate(parts)


def rows_of(case: Case, queries: Ints, spread: float, random: np.random.Generator) -> Ints:
    """[programs, block * levels * points * 4] cells that each program reads, -1 for none. A random head for each."""
    shapes = case.shapes(IMAGE)
    count, block = queries.shape
    offsets = initial_offsets().numpy()[random.integers(HEADS, size=count)][:, None, None]  # [programs, 1, 1, P, 2]
    offsets = offsets + random.normal(size=(count, block, len(shapes), POINTS, 2)) * spread
    sizes = np.array([(width, height) for height, width in shapes])[:, None]
    if case.queries is None:
        reference = centres(shapes).numpy()[queries][:, :, None, None]
        position = reference * sizes + offsets - 0.5
    else:
        centre, extent = random.random((count, block, 1, 1, 2)), 0.02 * 25 ** random.random((count, block, 1, 1, 2))
        position = (centre + offsets / POINTS * extent * 0.5) * sizes - 0.5
    corners = np.floor(position).astype(np.int64)[..., None, :] + np.array([(0, 0), (1, 0), (0, 1), (1, 1)])
    inside = ((corners >= 0) & (corners < sizes[:, None])).all(-1) & (queries >= 0)[:, :, None, None, None]
    first = np.cumsum([0] + [height * width for height, width in shapes[:-1]])[:, None, None]
    cells = first + corners[..., 1] * sizes[:, None, :, 0] + corners[..., 0]
    return np.where(inside, cells, -1).reshape(count, -1)


def distinct(rows: Ints) -> float:
    """The mean number of different entries of a row, -1 not counted."""
    ordered = np.sort(rows, 1)
    fresh = np.diff(ordered, axis=1, prepend=-1) != 0
    return float((fresh & (ordered >= 0)).sum() / len(rows))


def count(samples: int) -> Iterator[dict[str, object]]:
    """Bytes over the whole batch and all heads, for bfloat16: twice as many in float32, except for lines."""
    random, row = np.random.default_rng(0), CHANNELS * 2
    for name, case in CASES.items():
        decoder, shapes = case.queries is not None, case.shapes(IMAGE)
        for spread_name, spread in SPREADS.items():
            for block in BLOCKS:
                for width in (0,) if decoder else WIDTHS:
                    queries = programs(((1, case.queries or 0),) if decoder else shapes, block, width)
                    chosen = queries[random.choice(len(queries), min(samples, len(queries)), replace=False)]
                    rows = rows_of(case, chosen, spread, random)
                    times = len(queries) * case.batch * HEADS
                    pairs = np.where(rows >= 0, rows // 2, -1)
                    yield {
                        "case": name,
                        "offsets": spread_name,
                        "block_q": block,
                        "tile_width": width,
                        "gathered_mb": (rows >= 0).sum() / len(rows) * times * row / 1e6,
                        "from_l2_mb": distinct(rows) * times * row / 1e6,
                        "lines_mb": distinct(rows) * times * 128 / 1e6,
                        "lines_head_major_mb": distinct(pairs) * times * 128 / 1e6,
                        "program_kb": distinct(rows) * row / 1e3,
                    }


def compulsory_mb(case: Case, gathered_mb: float) -> float:
    """Every tensor of the forward pass once, bfloat16 beside a float32 reference; of value no more than is gathered."""
    size = sum(height * width for height, width in case.shapes(IMAGE))
    queries, levels = case.queries or size, len(case.strides)
    slots = queries * HEADS * levels * POINTS
    coordinates = queries * levels * (2 if case.queries is None else 4)
    others = case.batch * (queries * HEADS * CHANNELS * 2 + slots * 3 * 2 + coordinates * 4) / 1e6
    return others + min(case.batch * size * HEADS * CHANNELS * 2 / 1e6, gathered_mb)


def shape_of(found: dict) -> str:
    width = found["tile_width"]
    return f"{found['block_q']} in a row" if not width else f"{found['block_q'] // width} x {width}"


def table(found: list[dict]) -> list[list[str]]:
    """One line per case and shape of a program, one column per kind of offsets."""
    lines: dict[tuple[str, str], list[dict]] = {}
    for one in found:
        lines.setdefault((one["case"], shape_of(one)), []).append(one)
    return [
        [
            case,
            shape,
            f"{compulsory_mb(CASES[case], group[0]['gathered_mb']):.0f}",
            f"{group[0]['gathered_mb']:.0f}",
            *(f"{one['from_l2_mb']:.0f} ({one['gathered_mb'] / one['from_l2_mb']:.1f})" for one in group),
        ]
        for (case, shape), group in lines.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1024, help="programs counted for each line")
    samples = parser.parse_args().samples
    torch.manual_seed(0)
    total = len(SPREADS) * len(BLOCKS) * (2 * len(WIDTHS) + 2)
    found = list(track(count(samples), "counting", total))
    head = ["case", "queries of a program", "must move, MB", "gathered, MB", *(f"L2 to L1: {name}" for name in SPREADS)]
    about = f"""
Images of {IMAGE[0]} x {IMAGE[1]}, batch 2, {HEADS} heads x {CHANNELS} channels, {POINTS} points, bfloat16 (in float32 \
the gather is twice as large), forward. Must move: every tensor once through device memory. Gathered: four corners of \
every sample that are on the map (initial offsets). L2 to L1: the different rows of each program, in MB, and how often \
each is used; offsets as a network has them before training, and with normal noise on top, independent for every \
sample: neighbours in a trained network agree more than that. \
`make bench NAME=attention/traffic`, {date.today()}, {samples} programs a line."""
    record = {"date": date.today().isoformat(), "image": IMAGE, "samples": samples, "found": found}
    report.write("msda_traffic", f"{report.table(head, table(found))}\n{about}", record)
