"""Inference of three detectors in PyTorch, ONNX Runtime and OpenVINO, beside other libraries' detectors.

Runs of `codetr benchmark latency`, one image, random weights: all detectors and runtimes of a case take turns in one
process. Cases are written one by one; those that are not asked for keep what the result has of them.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch

from benchmarks import report
from codetr import application
from codetr.benchmark import latency_report
from codetr.benchmark.commands.latency import OURS, measure

NAME = "latency"
# Its name, the overrides, and whom it is measured with: transformers' Deformable DETR is the same detector as ours, of
# equal widths, layers and queries; RT-DETR is another, and there for orientation.
CASES = {
    "Deformable DETR, two stages, R50": (["model=deformable_detr_two_stage"], ["transformers/deformable_detr"]),
    "Deformable-DETR++, R50": (["model=deformable_pp"], ["transformers/rt_detr"]),
    "Co-DINO, R50, 4 scale": (["model=dino", "model/auxiliary_head=[faster_rcnn,atss]"], []),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="only these")
    parser.add_argument("--size", type=int, nargs=2, default=(640, 640), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--runtimes", nargs="+", default=["eager", "onnxruntime", "openvino"])
    parser.add_argument("--against", nargs="*", help="other libraries' detectors, in place of those of the case")
    options = parser.parse_args()
    path = report.folder / f"{NAME}.json"
    cases: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    for name in options.cases:
        overrides, against = CASES[name]
        found = _measured(overrides, against if options.against is None else options.against, options)
        for row in found["rows"]:
            row["detector"] = row["detector"].replace(OURS, name)
        found["operators"] = {key.replace(OURS, name): own for key, own in found["operators"].items()}
        cases[name] = found | {"threads": torch.get_num_threads()}
        cases = {one: cases[one] for one in CASES if one in cases}
        report.write(NAME, markdown(cases), cases)


def _measured(overrides: list[str], against: list[str], options: argparse.Namespace) -> dict[str, Any]:
    own = {"size": list(options.size), "batches": options.batches, "runtimes": options.runtimes, "against": against}
    given = [f"{key}=[{','.join(map(str, values))}]" for key, values in own.items()]
    return measure(application.compose("latency", [*overrides, *given, f"repeats={options.repeat}"]))


def markdown(cases: dict[str, Any]) -> str:
    tables = []
    for found in cases.values():
        height, width = found["size"]
        about = (
            f"Milliseconds of {found['repeats']} runs in turns, medians of the stages; {height} x {width}, 80 classes, "
            f"random weights, threads: {found['threads']}, on two cores of which other work took a part; "
            f"{found['date']}, {report.machine()}."
        )
        tables += [latency_report.latencies(found["rows"]), about]
    operators = {name: own for found in cases.values() for name, own in found["operators"].items()}
    return "\n\n".join([*tables, latency_report.operators(operators), "`make bench NAME=inference/latency`"])


if __name__ == "__main__":
    main()
