"""Registers, stack (spills) and shared memory of the Triton kernels, as the compiler says them. Needs no GPU."""

import argparse
import itertools
import warnings
from dataclasses import asdict
from datetime import date

from codetr.kernels.msda.ahead import ARCHITECTURES, KERNELS, all_cases, compiled, resources  # before Triton

# isort: split
import triton
from rich.progress import track

from benchmarks import report


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    warnings.simplefilter("ignore")
    cases = [{**asdict(case), **resources(compiled(case))} for case in track(all_cases(quick=False), "compiling")]
    record = {"date": date.today().isoformat(), "triton": triton.__version__, "cases": cases}
    report.write("msda_registers", markdown(record), record)


def markdown(record: dict) -> str:
    """A line for each kernel and architecture: from the narrowest to the widest head, all forms."""
    lines = []
    for kernel, dtype in itertools.product(KERNELS, ("float32", "bfloat16")):
        cells = []
        for architecture in ARCHITECTURES:
            key = (architecture, kernel, dtype)
            own = [case for case in record["cases"] if (case["architecture"], case["kernel"], case["dtype"]) == key]
            ranges = [sorted(case[name] for case in own) for name in ("registers", "stack", "shared")]
            cells.append(" / ".join(str(r[0]) if r[0] == r[-1] else f"{r[0]}-{r[-1]}" for r in ranges))
        lines.append([kernel, dtype, *cells])
    about = (
        "Registers per thread / bytes of stack per thread (spills) / bytes of shared memory per program, over head "
        "widths 8 to 128 and all forms. `make bench NAME=attention/registers`, "
        f"{record['date']}, Triton {record['triton']}."
    )
    return f"{report.table(['kernel', 'type', *(f'sm_{a}' for a in ARCHITECTURES)], lines)}\n\n{about}"
