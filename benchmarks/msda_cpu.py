"""Deformable attention on the CPU: the Numba kernel against the grid_sample loop, alternating in one process.

Prints a table and writes benchmarks/results/msda_cpu.json. `OMP_NUM_THREADS` sets the threads of both.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numba
import torch
from codetr.kernels.msda import msda, msda_reference
from rich.console import Console
from rich.table import Table
from torch import Tensor

RESULTS = Path(__file__).parent / "results" / "msda_cpu.json"
Shapes = tuple[tuple[int, int], ...]


def pyramid(size: int) -> Shapes:
    return tuple((size // stride, size // stride) for stride in (8, 16, 32, 64))


# name: batch, heads, channels per head, levels, queries (None: every token)
CASES: dict[str, tuple[int, int, int, Shapes, int | None]] = {
    "demo encoder, 4 x 32": (8, 4, 32, pyramid(128), None),
    "demo encoder, 8 x 16": (8, 8, 16, pyramid(128), None),
    "demo decoder, 100 queries": (8, 4, 32, pyramid(128), 100),
    "128 x 128": (1, 8, 32, pyramid(128), None),
    "256 x 256": (1, 8, 32, pyramid(256), None),
    "512 x 512": (1, 8, 32, pyramid(512), None),
}


def draw(batch: int, heads: int, channels: int, shapes: Shapes, queries: int | None) -> tuple[Tensor, Tensor, Tensor]:
    tokens = sum(h * w for h, w in shapes)
    slots = (batch, queries or tokens, heads, len(shapes), 4)
    weights = torch.rand(slots).flatten(3).softmax(-1).view(slots)
    return torch.randn(batch, tokens, heads, channels), torch.rand(*slots, 2), weights


def milliseconds(function: Callable, inputs: tuple[Tensor, ...], shapes: Shapes) -> tuple[float, float]:
    """Forward without gradients; forward and backward."""
    value, locations, weights = (t.detach().requires_grad_() for t in inputs)
    start = time.perf_counter()
    with torch.no_grad():
        output = function(value, shapes, locations, weights)
    middle = time.perf_counter()
    function(value, shapes, locations, weights).backward(output)
    return (middle - start) * 1e3, (time.perf_counter() - middle) * 1e3


def measure(case: tuple[int, int, int, Shapes, int | None], repeats: int) -> dict[str, dict[str, float]]:
    inputs, shapes = draw(*case), case[3]
    functions: dict[str, Callable] = {"grid_sample": msda_reference, "numba": msda}
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}
    for repeat in range(repeats + 2):
        for name, function in functions.items():
            times = milliseconds(function, inputs, shapes)
            if repeat >= 2:  # the first ones compile and warm up
                runs[name].append(times)
    names = ("forward_ms", "forward_backward_ms")
    return {
        name: dict(zip(names, map(statistics.median, zip(*times, strict=True)), strict=True))
        for name, times in runs.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=20)
    repeats = parser.parse_args().repeats
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    title = f"forward / forward + backward, {threads} threads"
    table = Table("", "grid_sample ms", "numba ms", "times faster", title=title)
    cases, lines = {}, ["| case | grid_sample, ms | Numba, ms | times faster |", "|---|---|---|---|"]
    for name, case in CASES.items():
        cases[name] = result = measure(case, repeats)
        slow, fast = result["grid_sample"].values(), result["numba"].values()
        columns = [" / ".join(f"{t:.2f}" for t in times) for times in (slow, fast)]
        columns.append(" / ".join(f"{s / f:.1f}" for s, f in zip(slow, fast, strict=True)))
        table.add_row(name, *columns)
        lines.append("| " + " | ".join([name, *columns]) + " |")
    Console().print(table)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numba": numba.__version__}
    record = {"date": date.today().isoformat(), "threads": threads, "repeats": repeats, "versions": versions}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({**record, "cases": cases}, indent=2) + "\n")
    about = f"Medians of {repeats}, {title}; `make bench`, {record['date']}, torch {torch.__version__}."
    RESULTS.with_suffix(".md").write_text("\n".join([*lines, "", about]) + "\n")


if __name__ == "__main__":
    main()
