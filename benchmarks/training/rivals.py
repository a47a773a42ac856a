"""Training steps and inference beside those of transformers and, where it is installed, rf-detr.

Every row is a run of `codetr benchmark step`: both detectors in one process, in turns. Where the other library has the
same detector, the row compares implementations; where it has not, it only says what another choice would cost.
"""

from __future__ import annotations

import argparse
import importlib.util
from datetime import date
from typing import Any, NamedTuple

from benchmarks import report
from codetr import application
from codetr.benchmark.commands.step import measure


class Pair(NamedTuple):
    """ours: overrides. same: whether both are the same detector."""

    name: str
    ours: tuple[str, ...]
    other: str
    same: bool = True


PAIRS = (
    Pair("Deformable DETR, two stages", ("model=deformable_detr_two_stage",), "transformers/deformable_detr"),
    Pair("Co-Deformable-DETR, K = 2", ("model=co_deformable",), "transformers/deformable_detr", same=False),
    Pair("Conditional DETR", ("model=conditional_detr",), "transformers/conditional_detr"),
    Pair("DAB-DETR", ("model=dab_detr",), "transformers/dab_detr"),
    Pair("DINO, 4 scales", ("model=dino",), "transformers/rt_detr", same=False),
    Pair("DINO, 4 scales", ("model=dino",), "transformers/mask2former", same=False),
    Pair("DINO, 4 scales", ("model=dino",), "rfdetr/small", same=False),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=2, default=(512, 512), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--same", action="store_true", help="only pairs of the same detector")
    options = parser.parse_args()
    height, width = options.size
    numbers = []
    for pair in PAIRS:
        absent = importlib.util.find_spec(pair.other.partition("/")[0]) is None
        fixed = pair.other.startswith("rfdetr") and (height, width) != (512, 512)  # takes squares of its own size
        if absent or fixed or (options.same and not pair.same):
            print(f"left out: {pair.other}")
            continue
        numbers.append({**pair._asdict(), **_measured(pair, options)})
    name = "rivals" if (height, width) == (512, 512) else f"rivals_{height}x{width}"
    report.write(name, markdown(numbers, options), numbers)


def _measured(pair: Pair, options: argparse.Namespace) -> dict[str, Any]:
    height, width = options.size
    own = [*pair.ours, f"against=[{pair.other}]", f"size=[{height},{width}]", f"repeats={options.repeat}"]
    config = application.compose("benchmark", [*own, "profile=false", "model.detector.backbone.pretrained=false"])
    return {"times": measure(config)["times"]}


def markdown(numbers: list[dict[str, Any]], options: argparse.Namespace) -> str:
    rows = []
    for pair in numbers:
        cells = [pair["name"], pair["other"] if pair["same"] else f"{pair['other']}, another detector"]
        for own in pair["times"].values():
            ours, other = own["ours"]["seconds"], own[pair["other"]]["seconds"]
            cells += [f"{ours:.2f}", f"{other:.2f}", f"{other / ours:.2f}"]
        rows.append(cells)
    head = [
        "ours",
        "other",
        "step, s",
        "its step, s",
        "times faster",
        "inference, s",
        "its inference, s",
        "times faster",
    ]
    height, width = options.size
    about = (
        f"Medians of {options.repeat} steps in turns, one process, batch 1, {height} x {width}, 80 classes, random "
        f"weights; `make bench NAME=training/rivals`, {date.today()}, {report.machine()}."
    )
    return f"{report.table(head, rows)}\n\n{about}"
