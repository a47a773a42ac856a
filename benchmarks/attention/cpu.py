"""Deformable attention on the CPU: the Numba kernels against what others run, alternating in one process.

Classic form: the loop of grid_sample over the levels, and the package torch-ms-deform-attn where it is installed (a
C++ extension: `pip install --no-build-isolation --no-deps torch-ms-deform-attn==0.1.1`, needs a compiler). Fused form:
the same loop after softmax, sampling locations and masking in PyTorch. Also the peak of memory beyond inputs and
outputs, and the time of compiling and of loading from the cache, each in a process of its own.

`OMP_NUM_THREADS` sets the threads of all.
"""

import argparse
import importlib.util
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numba
import torch
from codetr.kernels.msda import deformable_attention, deformable_attention_reference, msda, msda_reference
from codetr.kernels.msda.inputs import Inputs
from codetr.kernels.msda.reference import sampling_locations
from torch import Tensor

from benchmarks import report
from benchmarks.attention.inputs import FOUR, Case, draw

ENCODER, DECODER = Case(FOUR, None, batch=1), Case(FOUR, 900, batch=1)
CASES: dict[str, tuple[Case, tuple[int, int]]] = {
    "encoder, 256 x 256": (ENCODER, (256, 256)),
    "encoder, 512 x 512": (ENCODER, (512, 512)),
    "encoder, 800 x 1333": (ENCODER, (800, 1333)),
    "decoder, 900 queries": (DECODER, (800, 1333)),
}
USUAL, OURS, PACKAGE = "grid_sample", "numba", "torch-ms-deform-attn"
Attention = Callable[[Inputs], Tensor]


def drawn(name: str, fused: bool) -> Inputs:
    """The same samples in either form; in the fused one a tenth of the image is padding."""
    case, image = CASES[name]
    inputs = draw(case, torch.float32, torch.device("cpu"), image)
    assert inputs.reference is not None
    if fused:
        sizes = [(height, width - width // 10) for height, width in inputs.spatial_shapes]
        return inputs._replace(valid_sizes=torch.tensor([sizes], dtype=torch.int32))
    locations = sampling_locations(inputs.reference, inputs.offsets, inputs.spatial_shapes)
    weights = inputs.logits.flatten(3).softmax(-1).view_as(inputs.logits)
    return inputs._replace(reference=None, offsets=locations, logits=weights)


def attentions(inputs: Inputs) -> dict[str, Attention]:
    if inputs.reference is not None:
        return {USUAL: lambda i: deformable_attention_reference(*i), OURS: lambda i: deformable_attention(*i)}
    found: dict[str, Attention] = {
        USUAL: lambda i: msda_reference(i.value, i.spatial_shapes, i.offsets, i.logits),
        OURS: lambda i: msda(i.value, i.spatial_shapes, i.offsets, i.logits),
    }
    if importlib.util.find_spec("torch_ms_deform_attn"):
        from torch_ms_deform_attn import ms_deform_attn

        shapes = torch.tensor(inputs.spatial_shapes)
        starts = shapes.prod(1).cumsum(0) - shapes.prod(1)
        found[PACKAGE] = lambda i: ms_deform_attn(i.value, shapes, starts, i.offsets, i.logits)
    return found


def leaves(inputs: Inputs) -> Inputs:
    tensors = {name: getattr(inputs, name).detach().requires_grad_() for name in ("value", "offsets", "logits")}
    return inputs._replace(**tensors)


def milliseconds(attention: Attention, inputs: Inputs) -> tuple[float, float]:
    """Forward without gradients; forward and backward."""
    inputs = leaves(inputs)
    start = time.perf_counter()
    with torch.no_grad():
        output = attention(inputs)
    middle = time.perf_counter()
    attention(inputs).backward(output)
    return (middle - start) * 1e3, (time.perf_counter() - middle) * 1e3


def measure(name: str, fused: bool, seconds: float) -> dict[str, list[float]]:
    """Medians by implementation, in turns, for some seconds: at least three turns after the one that warms up."""
    inputs = drawn(name, fused)
    functions = attentions(inputs)
    runs: dict[str, list[tuple[float, float]]] = {key: [] for key in functions}
    end = time.perf_counter() + seconds
    for turn in range(100):
        for key, function in functions.items():
            times = milliseconds(function, inputs)
            if turn:
                runs[key].append(times)
        if turn >= 3 and time.perf_counter() > end:
            break
    return {key: [statistics.median(column) for column in zip(*times, strict=True)] for key, times in runs.items()}


def memory(name: str, key: str) -> float:
    """MB at the peak of forward + backward (fused) beyond inputs, output and their gradients."""
    tiny, inputs = (leaves(drawn(case, fused=True)) for case in ("encoder, 256 x 256", name))
    attention = attentions(inputs)[key]
    attention(tiny).sum().backward()  # compiles and starts threads
    gradient = torch.ones(1, inputs.logits.shape[1], inputs.value.shape[2] * inputs.value.shape[3])
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    before = report.peak()
    output = attention(inputs)
    output.backward(gradient)
    known = sum(t.nbytes for t in (output, inputs.value, inputs.offsets, inputs.logits))
    return ((report.peak() - before) * 2**20 - known) / 1e6


def compiling() -> float:
    """Seconds until the kernels for 32 channels are there."""
    from codetr.kernels.msda.numba_kernels import kernels

    start = time.perf_counter()
    kernels(32)
    return time.perf_counter() - start


def aside() -> dict[str, float]:
    """What needs processes of its own."""
    found = {f"{key}_MB": report.alone(memory, "encoder, 800 x 1333", key) for key in (OURS, USUAL)}
    with tempfile.TemporaryDirectory() as folder:
        for key in ("compile_s", "load_s"):
            os.environ["NUMBA_CACHE_DIR"] = folder  # of the process that is started
            found[key] = report.alone(compiling)
            del os.environ["NUMBA_CACHE_DIR"]
    return found


def rows(measured: dict[str, dict[str, list[float]]]) -> list[list[str]]:
    """Times, and how many times longer than ours."""

    def both(times: list[float]) -> str:
        return " / ".join(f"{t:.1f}" for t in times)

    table = []
    for name, times in measured.items():
        ratios = {key: [t / own for t, own in zip(times[key], times[OURS], strict=True)] for key in times}
        package = [both(times[PACKAGE]), both(ratios[PACKAGE])] if PACKAGE in times else ["", ""]
        table.append([name, both(times[OURS]), both(times[USUAL]), both(ratios[USUAL]), *package])
    return table


def markdown(record: dict) -> str:
    header = ["case", "Numba, ms", "grid_sample, ms", "times faster", f"{PACKAGE}, ms", "times faster"]
    own = record["aside"]
    about = (
        f"Forward / forward + backward, float32, batch 1, 8 heads x 32, 4 levels, 4 points; medians in turns, "
        f"{record['threads']} threads. Memory at the peak beyond inputs, output and gradients, encoder 800 x 1333, "
        f"fused: {own[f'{OURS}_MB']:.0f} MB; grid_sample {own[f'{USUAL}_MB']:.0f} MB. The first call compiles for "
        f"{own['compile_s']:.1f} s, the next process loads in {own['load_s']:.2f} s. `make bench`, {record['date']}, "
        f"{record['machine']}, torch {record['versions']['torch']}, load average {record['load']:.1f} before."
    )
    return f"{report.table(header, rows(record['cases']))}\n\n{about}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10, help="to spend on each row of the table, at the least")
    options = parser.parse_args()
    torch.manual_seed(0)
    load, cases = os.getloadavg()[0], {}
    for form in ("classic", "fused"):
        for name in CASES:
            cases[f"{form}, {name}"] = measure(name, form == "fused", options.seconds)
    record = {
        "date": date.today().isoformat(),
        "machine": processor(),
        "threads": torch.get_num_threads(),
        "load": load,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numba": numba.__version__},
        "cases": cases,
        "aside": aside(),
    }
    report.write("msda_cpu", markdown(record), record)


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
