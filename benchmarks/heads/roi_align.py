"""RoIAlign over the levels of a pyramid on the CPU: the Numba kernels against torchvision, one call per level with all
regions, alternating in one process.

Regions, their number and their samples are those of the heads' configurations: `faster_rcnn_small` on the demo's images
of 128 pixels, `faster_rcnn`, `mask_rcnn_branch` and the finest semantic map of `refine_mask` at 512. Maps lie as the
encoder's tokens do, channels last; one case has them as convolutions leave them. Also the time of compiling and of
loading from the cache, each in a process of its own. `OMP_NUM_THREADS` sets the threads of both.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date

import torch
from codetr.kernels.roi_align import roi_align, roi_align_reference
from torch import Tensor

from benchmarks import report
from codetr.heads.roi import RoIPool

STRIDES = (8, 16, 32, 64)
WAYS: dict[str, Callable[..., Tensor]] = {"torchvision": roi_align_reference, "numba": roi_align}


@dataclass(frozen=True)
class Case:
    batch: int
    image: int  # pixels per side
    width: int
    regions: int  # per image
    finest_cells: int
    size: int
    ratio: int
    strides: tuple[int, ...] = STRIDES
    layout: torch.memory_format = torch.channels_last


CASES = {
    "demo": Case(8, 128, 64, 32, 4, 5, 1),
    "512 x 512": Case(1, 512, 256, 512, 14, 7, 0),
    "512 x 512, contiguous": Case(1, 512, 256, 512, 14, 7, 0, layout=torch.contiguous_format),
    "512 x 512, 2 samples": Case(1, 512, 256, 512, 14, 7, 2),
    "512 x 512, masks": Case(1, 512, 256, 128, 14, 14, 0),
    "512 x 512, finest level": Case(1, 512, 256, 128, 14, 28, 0, strides=STRIDES[:1]),
}


def drawn(case: Case) -> tuple:
    """What both ways take. The sides of the boxes are spread evenly on a logarithmic scale, from 5 % of the image's."""
    torch.manual_seed(0)
    shapes = [(case.batch, case.width, case.image // s, case.image // s) for s in case.strides]
    levels = [torch.randn(shape).contiguous(memory_format=case.layout).requires_grad_() for shape in shapes]
    images = torch.arange(case.batch).repeat_interleave(case.regions)
    sides = 0.05 * 19 ** torch.rand(len(images), 2)
    low = torch.rand(len(images), 2) * (1 - sides)
    boxes = torch.cat([low, low + sides], 1) * case.image
    level_of = RoIPool(case.size, case.finest_cells, case.ratio).levels(boxes, case.strides)
    return levels, case.strides, images, boxes, level_of, case.size, case.ratio


def milliseconds(way: Callable[..., Tensor], given: tuple) -> tuple[float, float]:
    """Forward without gradients; forward and backward."""
    start = time.perf_counter()
    with torch.no_grad():
        output = way(*given)
    middle = time.perf_counter()
    torch.autograd.grad(way(*given), given[0], output, allow_unused=True)
    return (middle - start) * 1e3, (time.perf_counter() - middle) * 1e3


def measure(case: Case, seconds: float) -> dict[str, list[float]]:
    """Medians by way, in turns, for some seconds: at least three turns after the one that warms up."""
    given = drawn(case)
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
    end = time.perf_counter() + seconds
    for turn in range(100):
        for name, way in WAYS.items():
            times = milliseconds(way, given)
            if turn:
                runs[name].append(times)
        if turn >= 3 and time.perf_counter() > end:
            break
    return {name: [statistics.median(column) for column in zip(*times, strict=True)] for name, times in runs.items()}


def compiling() -> float:
    """Seconds until both kernels are there."""
    from codetr.kernels.roi_align.numba_kernels import kernels

    start = time.perf_counter()
    kernels()
    return time.perf_counter() - start


def compile_and_load() -> tuple[float, float]:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["NUMBA_CACHE_DIR"] = folder  # of the processes that are started
        found = report.alone(compiling), report.alone(compiling)
        del os.environ["NUMBA_CACHE_DIR"]
    return found


def row(name: str, times: dict[str, list[float]]) -> list[str]:
    case, (theirs, ours) = CASES[name], (times[way] for way in WAYS)
    about = f"{case.batch} x {case.regions}", str(case.width), str(case.size), str(case.ratio or "adaptive")
    factors = (a / b for a, b in zip(theirs, ours, strict=True))
    return [name, *about, *(" / ".join(f"{t:.1f}" for t in column) for column in (theirs, ours, factors))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10, help="to spend on each row of the table, at the least")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    rows = [row(name, measure(case, options.seconds)) for name, case in CASES.items()]
    compiled, loaded = compile_and_load()
    head = ["case", "regions", "channels", "cells", "samples", "torchvision, ms", "Numba, ms", "times faster"]
    about = (
        f"Forward / forward + backward, float32; cells and samples per side; medians in turns. The first call compiles "
        f"for {compiled:.1f} s, the next process loads in {loaded:.2f} s. `make bench NAME=heads/roi_align`, "
        f"{date.today()}, {report.machine()}, {torch.get_num_threads()} threads, load average {load:.1f} before."
    )
    report.write("roi_align", f"{report.table(head, rows)}\n\n{about}")
