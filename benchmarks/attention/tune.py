"""Finds the launch constants of the Triton kernels for the card at hand: its row of kernels/msda/launch.json.

Compiles every configuration first and drops those that spill registers, or compile to the code of another. Measures
the rest on encoder and decoder with 4 levels, the best few with 4 and 5. `--dry-run` only compiles: no GPU is needed.
"""

import argparse
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import re
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
from codetr.kernels.msda import ahead  # before anything imports Triton: it turns the interpreter off

# isort: split
import triton
from codetr.kernels.msda import gpu
from codetr.kernels.msda.inputs import Inputs
from codetr.kernels.msda.launch import Launch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.attention.gpu import times, upstream
from benchmarks.attention.inputs import CASES, CHANNELS, draw

TABLE = Path(__file__).parents[2] / "kernels" / "msda" / "launch.json"  # also where the package is a copy
KERNELS = ("forward", "backward")
DTYPES = {16: "bfloat16", 32: "float32"}
TILES, TILE_WIDTHS, WARPS = (256, 512, 1024, 2048), (0, 4, 8, 16), (1, 2, 4, 8)
HEAD_WIDTHS = (8, 16, 64, 128)  # beside CHANNELS: the winner must not spill there either
SCREEN, FINAL = ("encoder, 4 levels", "decoder, 4 levels"), tuple(CASES)
FINALISTS = 4


@dataclass(frozen=True)
class Code:
    """What the compiler made of a configuration."""

    registers: int
    stack: int
    digest: str


def examine(architecture: int, kernel: str, bits: int, launch: Launch, width: int = CHANNELS) -> Code:
    case = ahead.Case(architecture, kernel, DTYPES[bits], width, "boxes")
    binary = ahead.compiled(case, launch)
    found = ahead.resources(binary)
    return Code(found["registers"], found["stack"], hashlib.sha256(binary.asm["cubin"]).hexdigest())  # type: ignore[arg-type]


def compile_all(architecture: int, pool: ProcessPoolExecutor) -> dict[tuple[str, int, Launch], Code]:
    """The tile's width changes addresses, not registers: compiled for one."""
    launches = [Launch(tile, min(8, tile // CHANNELS), warps) for tile, warps in itertools.product(TILES, WARPS)]
    keys = list(itertools.product(KERNELS, DTYPES, launches))
    with Progress() as progress:
        task = progress.add_task(f"compiling for sm_{architecture}", total=len(keys))
        futures = [pool.submit(examine, architecture, *key) for key in keys]
        for future in futures:
            future.add_done_callback(lambda _: progress.advance(task))
        return {key: future.result() for key, future in zip(keys, futures, strict=True)}


def candidates(codes: dict[tuple[str, int, Launch], Code], kernel: str, bits: int) -> list[Launch]:
    """Without spills, each code once, in every width of the tiles."""
    found, seen = [], set()
    for (of_kernel, of_bits, launch), code in codes.items():
        if (of_kernel, of_bits) == (kernel, bits) and not code.stack and code.digest not in seen:
            seen.add(code.digest)
            widths = [width for width in TILE_WIDTHS if width <= launch.block_q(CHANNELS)]
            found += [launch._replace(tile_width=width) for width in widths]
    return found


def show(codes: dict[tuple[str, int, Launch], Code], architecture: int) -> None:
    """Registers per thread, bytes of stack where there are any, and whether a second stage changes the code."""
    warps_of = [f"{warps} warps" for warps in WARPS]
    shown = Table("kernel", "tile", *warps_of, title=f"registers (stack) on sm_{architecture}")
    for kernel, bits, tile in itertools.product(KERNELS, DTYPES, TILES):
        cells = []
        for warps in WARPS:
            one, two = (
                code
                for (*what, launch), code in codes.items()
                if what == [kernel, bits] and (launch.tile, launch.num_warps) == (tile, warps)
            )
            stack = f" [red]({one.stack})[/red]" if one.stack else ""
            other = f" | {two.registers} ({two.stack})" if two.digest != one.digest else ""
            cells.append(f"{one.registers}{stack}{other}")
        shown.add_row(f"{kernel}, {bits} bits", str(tile), *cells)
    Console(width=120).print(shown)


def job(kernel: str, inputs: Inputs, launch: Launch) -> Callable[[], object]:
    if kernel == "forward":
        return lambda: gpu.forward(inputs, launch)
    gradient, output = upstream(inputs), gpu.forward(inputs)
    return lambda: gpu.backward(gradient, output, inputs, False, launch, deterministic=False)


def warm(kernel: str, bits: int, title: str, launches: list[Launch]) -> None:
    """Compiles what will be launched, into the cache on disk that all processes share."""
    torch.manual_seed(0)
    inputs = draw(CASES[title], getattr(torch, DTYPES[bits]), torch.device("cuda"))
    for launch in launches:
        job(kernel, inputs, launch)()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def scores(
    kernel: str, bits: int, titles: tuple[str, ...], launches: list[Launch], repeats: int, pool: ProcessPoolExecutor
) -> dict[Launch, dict[str, float]]:
    """ms per case. The decoder's queries form no tiles: measured for one width."""
    found: dict[Launch, dict[str, float]] = {launch: {} for launch in launches}
    for title in titles:
        flat = CASES[title].queries is not None
        distinct = list(dict.fromkeys(launch._replace(tile_width=0) if flat else launch for launch in launches))
        share = max(1, math.ceil(len(distinct) / (os.cpu_count() or 1)))
        parts = [distinct[i : i + share] for i in range(0, len(distinct), share)]
        for future in [pool.submit(warm, kernel, bits, title, part) for part in parts]:
            future.result()
        inputs = draw(CASES[title], getattr(torch, DTYPES[bits]), torch.device("cuda"))
        taken = times({launch: job(kernel, inputs, launch) for launch in distinct}, repeats)  # type: ignore[arg-type, misc]
        for launch in launches:
            found[launch][title] = taken[launch._replace(tile_width=0) if flat else launch]["ms"]  # type: ignore[index]
    return found


def mean(taken: dict[str, float]) -> float:
    """Geometric."""
    return math.exp(sum(map(math.log, taken.values())) / len(taken))


def best(
    architecture: int, kernel: str, bits: int, launches: list[Launch], repeats: int, pool: ProcessPoolExecutor
) -> tuple[Launch, dict[str, float]]:
    """The fastest that spills at no head width."""
    screened = scores(kernel, bits, SCREEN, launches, max(5, repeats // 3), pool)
    finalists = sorted(launches, key=lambda one: mean(screened[one]))[:FINALISTS]
    final = scores(kernel, bits, FINAL, finalists, repeats, pool)
    kinds = ("backward", "backward, deterministic") if kernel == "backward" else (kernel,)
    for launch in sorted(final, key=lambda one: mean(final[one])):
        pairs = itertools.product(kinds, HEAD_WIDTHS)
        others = [pool.submit(examine, architecture, kind, bits, launch, width) for kind, width in pairs]
        if not any(other.result().stack for other in others):
            return launch, final[launch]
    sys.exit(f"{kernel}, {bits} bits: every one of the fastest {FINALISTS} spills at some head width")


def written(table: dict) -> str:
    """JSON, a line per configuration."""
    text = json.dumps(table, indent=1) + "\n"
    return re.sub(r"\{\s*([^{}]*?)\s*\}", lambda inner: "{" + " ".join(inner[1].split()) + "}", text)


def tune(architecture: int, codes: dict, repeats: int, pool: ProcessPoolExecutor) -> None:
    table = json.loads(TABLE.read_text())
    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    row: dict = {"source": f"measured on {torch.cuda.get_device_name(0)}, {versions}, {date.today()}"}
    with Progress() as progress:
        task = progress.add_task("measuring", total=len(KERNELS) * len(DTYPES))
        for kernel, bits in itertools.product(KERNELS, DTYPES):
            launches = candidates(codes, kernel, bits)
            launch, taken = best(architecture, kernel, bits, launches, repeats, pool)
            row.setdefault(kernel, {})[f"{bits} bits"] = launch._asdict()
            progress.console.print(f"{kernel}, {bits} bits, of {len(launches)}: {launch}")
            progress.console.print("  " + ", ".join(f"{title} {ms:.3f} ms" for title, ms in taken.items()))
            progress.advance(task)
    table[f"sm_{architecture}"] = row
    ordered = dict(sorted(table.items(), key=lambda item: int(item[0].removeprefix("sm_"))))
    TABLE.write_text(written(ordered))
    print(f"wrote {TABLE}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="compile and show, measure nothing")
    parser.add_argument("--architecture", type=int, help="of a dry run, 90 for sm_90; default: the card's, or 90")
    parser.add_argument("--repeats", type=int, default=30)
    given = parser.parse_args()
    if not (given.dry_run or torch.cuda.is_available()):
        sys.exit("no CUDA device: run this where there is one, or with --dry-run to see what would be measured")
    if given.architecture and not given.dry_run:
        parser.error("--architecture goes with --dry-run: a card is tuned for what it is")
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    architecture = given.architecture or 10 * major + minor
    workers = os.cpu_count() or 1
    if not given.dry_run:  # each holds one case of it at a time
        workers = min(workers, max(1, torch.cuda.get_device_properties(0).total_memory // 2**32))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        codes = compile_all(architecture, pool)
        show(codes, architecture)
        for kernel, bits in itertools.product(KERNELS, DTYPES):
            print(f"{kernel}, {bits} bits: {len(candidates(codes, kernel, bits))} configurations to measure")
        if not given.dry_run:
            tune(architecture, codes, given.repeats, pool)
