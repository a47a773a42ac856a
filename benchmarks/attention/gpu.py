"""Deformable attention on a CUDA device: our kernels beside every other way to compute it, alternating in one process.

Checks each against float64 first and times none that is wrong; writes after every case. `--check` only compares, on the
CPU where there is no GPU.
"""

import argparse
import importlib.metadata
import importlib.util
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
from codetr.kernels.msda import deformable_attention, deformable_attention_reference, msda
from codetr.kernels.msda.inputs import Inputs
from codetr.kernels.msda.reference import sampling_locations
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from benchmarks.attention.gpu_tables import tables, write
from benchmarks.attention.inputs import CASES, Case, atomic_bytes, draw, gather_bytes, hbm_bytes, without_ambiguous

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LIMITS = {"float32": 1e-4, "bfloat16": 2e-2}  # of the relative error, in the norm
SMALL = 160, 267
WARM_UP = 3
AHEAD = 10_000_000  # cycles that the device sleeps, so that the whole job is queued before it begins
OURS = "codetr"
DEVICE = torch.device("cuda")


@dataclass(frozen=True)
class Implementation:
    function: Callable[[Inputs], Tensor]
    deterministic: bool = False
    tolerance: float = 1.0  # times the limit


def classic_form(inputs: Inputs, function: Callable = msda) -> Tensor:
    """Softmax and locations in PyTorch, in float32 as every code base has them, before an op of the classic form."""
    value, shapes, reference, offsets, logits, _ = inputs
    weights = logits.flatten(3).float().softmax(-1).view(logits.shape)
    return function(value, shapes, sampling_locations(reference, offsets, shapes), weights)


def deformops(**options: object) -> Callable[[Inputs], Tensor]:
    """The package's own choice for the device, with the softmax inside; options: see its documentation."""
    from deformops.registry import Backend
    from deformops.registry import msda as theirs

    if options:
        options["backend"] = Backend.TRITON
    tables: dict[object, tuple[Tensor, Tensor]] = {}

    def function(inputs: Inputs) -> Tensor:
        value, shapes, reference, offsets, logits, _ = inputs
        if shapes not in tables:
            sizes = torch.tensor(shapes, dtype=torch.int32, device=value.device)
            cells = sizes.prod(1)
            tables[shapes] = sizes, (cells.cumsum(0) - cells).int()
        locations = sampling_locations(reference, offsets, shapes)
        return theirs(value, *tables[shapes], locations, logits, method="softmax", **options)

    return function


def implementations(classic: Path | None, skip: list[str]) -> tuple[dict[str, Implementation], dict[str, str]]:
    """Those that this machine has, and why it lacks the others."""
    compiled = torch.compile(lambda inputs: deformable_attention_reference(*inputs), dynamic=False, fullgraph=True)
    found = {
        OURS: Implementation(lambda inputs: deformable_attention(*inputs)),
        f"{OURS}, deterministic": Implementation(lambda inputs: deformable_attention(*inputs), deterministic=True),
        f"{OURS}, classic form": Implementation(classic_form),
        "grid_sample": Implementation(lambda inputs: deformable_attention_reference(*inputs)),
        "torch.compile": Implementation(compiled),
    }
    missing = {}
    if importlib.util.find_spec("deformops"):
        # From sm_90 on it sums the gradient of value in bfloat16, which costs digits.
        found["deformops"] = Implementation(deformops(), tolerance=10)
        found["deformops, fp32acc"] = Implementation(deformops(fp32acc=True), tolerance=2)
    else:
        missing["deformops"] = "not installed (pip install deformops==3.0.1, from Python 3.12 on)"
    if classic:
        from benchmarks.attention.classic import Classic, build

        theirs = Classic(build(classic))
        found["classic CUDA"] = Implementation(lambda inputs: classic_form(inputs, theirs))
    else:
        missing["classic CUDA"] = "not given (--classic DIR)"
    return {name: one for name, one in found.items() if name not in skip}, missing


@contextmanager
def determinism(wanted: bool):  # type: ignore[no-untyped-def]
    """Without its habit of filling fresh memory, which would be timed."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(wanted)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def job(one: Implementation, inputs: Inputs, gradient: Tensor | None) -> Callable[[], tuple[Tensor, ...]]:
    """Forward without gradients; with `gradient` forward and backward, down to value, offsets and logits."""
    leaves = [t.detach().requires_grad_() for t in (inputs.value, inputs.offsets, inputs.logits)]
    inputs = inputs._replace(value=leaves[0], offsets=leaves[1], logits=leaves[2])

    def run() -> tuple[Tensor, ...]:
        if gradient is None:
            with torch.no_grad():
                return (one.function(inputs),)
        with determinism(one.deterministic):
            output = one.function(inputs)
            return output.detach(), *torch.autograd.grad(output, leaves, gradient)

    return run


def upstream(inputs: Inputs) -> Tensor:
    value = inputs.value
    size = (value.shape[0], inputs.offsets.shape[1], value.shape[2] * value.shape[3])
    return torch.randn(size).to(value.device, value.dtype)


def error(one: Implementation, case: Case, dtype: str, device: torch.device) -> float:
    """The largest relative error, in the norm, of the output and the three gradients, for a small image."""
    inputs = without_ambiguous(draw(case, DTYPES[dtype], device, SMALL))
    gradient = upstream(inputs)
    actual = job(one, inputs, gradient)()
    wide = inputs._replace(**{name: getattr(inputs, name).double() for name in ("value", "offsets", "logits")})
    true = Implementation(lambda given: deformable_attention_reference(*given))
    expected = job(true, wide._replace(reference=inputs.reference.double()), gradient.double())()
    errors = [((a.double() - e).norm() / e.norm()).item() for a, e in zip(actual, expected, strict=True)]
    return max(errors) if all(e == e for e in errors) else float("inf")


def usable(
    found: dict[str, Implementation], case: Case, dtype: str, device: torch.device
) -> tuple[dict[str, float], dict[str, str]]:
    """The error of every implementation that is right, and what is the matter with the others. Ours must be right."""
    errors, refused = {}, {}
    for name, one in found.items():
        try:
            off = error(one, case, dtype, device)
        except Exception as problem:  # of another's package: to be reported, not to end the measurement
            if name.startswith(OURS):
                raise
            refused[name] = f"{type(problem).__name__}: {str(problem).splitlines()[0] if str(problem) else ''}"
            continue
        if off <= LIMITS[dtype] * one.tolerance:
            errors[name] = off
        elif name.startswith(OURS):
            sys.exit(f"{name} is wrong: relative error {off:.1e} in {dtype}; nothing was timed")
        else:
            refused[name] = f"relative error {off:.1e}"
    return errors, refused


def times(jobs: dict[str, Callable[[], object]], repeats: int) -> dict[str, dict[str, float]]:
    """Medians and quartiles in ms on the device, one job after the other in every round, and what the host needs.

    Before each, L2 is overwritten: in a model, other layers have run in between.
    """
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    flush = torch.empty(max(2 * cache, 2**28), dtype=torch.uint8, device=DEVICE)
    device: dict[str, list[float]] = {name: [] for name in jobs}
    host: dict[str, list[float]] = {name: [] for name in jobs}
    for repeat in range(repeats + WARM_UP):
        for name, run in jobs.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            flush.zero_()
            torch.cuda._sleep(AHEAD)
            begin.record()
            start = time.perf_counter()
            run()
            took = time.perf_counter() - start
            end.record()
            torch.cuda.synchronize()
            if repeat >= WARM_UP:
                device[name].append(begin.elapsed_time(end))
                host[name].append(took * 1e3)
    found = {}
    for name, taken in device.items():
        low, middle, high = statistics.quantiles(taken, n=4)
        found[name] = {"ms": middle, "low": low, "high": high, "host_ms": statistics.median(host[name])}
    return found


def peak(run: Callable[[], object]) -> float:
    """MB on top of what was there."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def our_kernels(inputs: Inputs, gradient: Tensor) -> dict[str, Callable[[], object]]:
    """Forward and backward by themselves, without autograd."""
    from codetr.kernels.msda import gpu

    output = gpu.forward(inputs)
    return {
        "forward": lambda: gpu.forward(inputs),
        "backward": lambda: gpu.backward(gradient, output, inputs, False, deterministic=False),
        "backward, deterministic": lambda: gpu.backward(gradient, output, inputs, False, deterministic=True),
    }


def floors(inputs: Inputs, rates: dict[str, float]) -> dict[str, dict[str, float]]:
    """In ms: what device memory, the gather and the atomics take at the rates that the card was measured to reach."""
    name = str(inputs.value.dtype).removeprefix("torch.")
    forward, backward = hbm_bytes(inputs)
    gather = {level: gather_bytes(inputs) / rates[f"{level}, {name}"] * 1e3 for level in ("L2", "L1")}
    atomics = {"atomics": atomic_bytes(inputs) / rates["atomics"] * 1e3}
    return {
        "forward": {"memory": forward / rates["memory"] * 1e3, **gather},
        "backward": {"memory": backward / rates["memory"] * 1e3, **gather, **atomics},
        "backward, deterministic": {"memory": backward / rates["memory"] * 1e3, **gather},
    }


def measure(
    found: dict[str, Implementation], case: Case, dtype: str, rates: dict[str, float], repeats: int, spread: float
) -> dict[str, object]:
    torch._dynamo.reset()
    errors, refused = usable(found, case, dtype, DEVICE)
    inputs = draw(case, DTYPES[dtype], DEVICE, spread=spread)
    gradient = upstream(inputs)
    forward, both, memory = {}, {}, {}
    for name in errors:
        alone, together = job(found[name], inputs, None), job(found[name], inputs, gradient)
        try:
            alone()
            together()
            memory[name] = peak(together)
        except torch.OutOfMemoryError:
            refused[name] = "out of memory"
            continue
        forward[name], both[name] = alone, together
    return {
        "errors": errors,
        "refused": refused,
        "forward": times({n: run for n, run in forward.items() if not found[n].deterministic}, repeats),
        "forward_backward": times(both, repeats),
        "peak_mb": memory,
        "kernels": times(our_kernels(inputs, gradient), repeats),
        "floors_ms": floors(inputs, rates),
    }


def provenance(given: argparse.Namespace) -> dict[str, object]:
    import triton

    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    driver = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    theirs = {"deformops": importlib.metadata.version("deformops")} if importlib.util.find_spec("deformops") else {}
    return {
        "date": date.today().isoformat(),
        "command": " ".join(sys.argv),
        "card": torch.cuda.get_device_name(0),
        "driver": driver,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            **theirs,
        },
        "repeats": given.repeats,
        "spread": given.spread,
    }


def compare(found: dict[str, Implementation], cases: dict[str, Case], device: torch.device) -> None:
    """Prints the errors alone."""
    shown = Table("", *DTYPES, title=f"largest relative error on {device}")
    for title, case in cases.items():
        columns = [usable(found, case, dtype, device) for dtype in DTYPES]
        for name in found:
            cells = [f"{errors[name]:.1e}" if name in errors else refused[name] for errors, refused in columns]
            shown.add_row(f"{title}, {name}", *cells)
    Console().print(shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classic", type=Path, help="folder models/ops/src of a checkout of Deformable-DETR")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--spread", type=float, default=2.0, help="noise of the offsets, in cells")
    parser.add_argument("--case", choices=list(CASES), nargs="*", default=list(CASES))
    parser.add_argument("--skip", nargs="*", default=[], help="implementations, by name")
    parser.add_argument("--check", action="store_true", help="compare with float64, time nothing")
    given = parser.parse_args()
    if not (torch.cuda.is_available() or given.check):
        sys.exit("no CUDA device: run this where there is one, or with --check to compare on the CPU")
    torch.manual_seed(0)
    found, missing = implementations(given.classic, given.skip)
    cases = {title: CASES[title] for title in given.case}
    if given.check:
        return compare(found, cases, DEVICE if torch.cuda.is_available() else torch.device("cpu"))
    from benchmarks.attention.probe import limits

    record: dict = {**provenance(given), "missing": missing, "rates": limits(), "cases": {}}
    todo = [(title, dtype) for title in cases for dtype in DTYPES]
    for title, dtype in track(todo, "measuring"):
        record["cases"][f"{title}, {dtype}"] = measure(
            found, cases[title], dtype, record["rates"], given.repeats, given.spread
        )
        write(record)
    for lines in tables(record):
        shown = Table(*lines[0])
        for line in lines[1:]:
            shown.add_row(*line)
        Console(width=200).print(shown)
