"""Inference of two detectors in PyTorch, ONNX Runtime and OpenVINO, beside transformers' Deformable DETR.

Runs of `codetr benchmark latency`, one image of 640 x 640, random weights: all detectors and runtimes of a run take
turns in one process.
"""

from __future__ import annotations

import argparse
from datetime import date
from typing import Any

import torch

from benchmarks import report
from codetr import application
from codetr.benchmark import latency_report
from codetr.benchmark.commands.latency import OURS, measure

OTHER = "transformers/deformable_detr"
CASES = {
    "Deformable-DETR++, R50": (["model=deformable_pp"], [OTHER]),
    "Co-DINO, R50, 4 scale": (["model=dino", "model/auxiliary_head=[faster_rcnn,atss]"], []),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=2, default=(640, 640), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--runtimes", nargs="+", default=["eager", "onnxruntime", "openvino"])
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    operators: dict[str, dict[str, float]] = {}
    for name, (overrides, against) in CASES.items():
        found = _measured(overrides, against, options)
        rows += [row | {"detector": row["detector"].replace(OURS, name)} for row in found["rows"]]
        operators |= {key.replace(OURS, name): own for key, own in found["operators"].items()}
    numbers = {"rows": rows, "operators": operators}
    report.write("latency", markdown(numbers, options), numbers)


def _measured(overrides: list[str], against: list[str], options: argparse.Namespace) -> dict[str, Any]:
    own = {"size": list(options.size), "batches": options.batches, "runtimes": options.runtimes, "against": against}
    given = [f"{key}=[{','.join(map(str, values))}]" for key, values in own.items()]
    return measure(application.compose("latency", [*overrides, *given, f"repeats={options.repeat}"]))


def markdown(numbers: dict[str, Any], options: argparse.Namespace) -> str:
    height, width = options.size
    about = (
        f"Milliseconds of {options.repeat} runs in turns, medians of the stages; {height} x {width}, 80 classes, "
        f"random weights, threads: {torch.get_num_threads()}; "
        f"`make bench NAME=inference/latency`, {date.today()}, {report.machine()}."
    )
    tables = [latency_report.latencies(numbers["rows"]), latency_report.operators(numbers["operators"])]
    return "\n\n".join([*tables, about])


if __name__ == "__main__":
    main()
