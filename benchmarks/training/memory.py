"""Peak memory that `codetr estimate` says, beside what a process takes on a CPU.

Every model is estimated, and then trained for two steps and run once, each in a process of its own; what that process
had before the detector was built, with all libraries loaded and all kernels compiled, is taken off. Steps run with
`static_shapes=true`, as they are estimated, and as they come, where fewer queries are used than there are places.
"""

import argparse
import ctypes
import gc
import os
from datetime import date
from pathlib import Path

import torch
from rich.progress import track

from benchmarks import report
from codetr import application
from codetr.costs.estimate import Estimator
from codetr.costs.step import Step, draw, with_classes, without_pretrained

CASES = {
    "Deformable-DETR++, R50": (["model=deformable_pp"], (512, 512), 2),
    "Co-Deformable-DETR, R50, K = 2": (["model=co_deformable"], (512, 512), 2),
    "Conditional DETR, R50": (["model=conditional_detr"], (512, 512), 2),
    "Conditional DETR, R50, 11 groups": (["model=conditional_detr", "model.query_groups=11"], (384, 512), 2),
    "DINO, R50, 4 scale": (["model=dino"], (384, 512), 2),
    "Co-DINO, Swin-T, K = 2": (["model=co_dino", "model/backbone=swin_tiny"], (320, 448), 1),
    "demo": (["experiment=demo"], (128, 128), 8),
}
OBJECTS = 20
STATIC, AS_IT_COMES = "static_shapes=true", "static_shapes=false"
MIB = 2**20
# So that memory which is given back counts as given back: glibc keeps what is smaller than its own, growing bound.
os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def step_of(overrides: list[str], size: tuple[int, int], batch: int, static: str) -> Step:
    config = without_pretrained(application.compose("estimate", [*overrides, static]))
    classes, device = with_classes(config), torch.device("cpu")
    return Step(config, draw(batch, size, OBJECTS, classes, device), classes, device)


def estimated(overrides: list[str], size: tuple[int, int], batch: int) -> dict[str, float]:
    """MiB. Without the moving average, which is a callback of the training."""
    config = application.compose("estimate", overrides)
    estimator = Estimator(config, with_classes(config), OBJECTS)
    return {
        "training": (estimator.training(batch, size).memory - estimator.weights.average) / MIB,
        "inference": estimator.inference(batch, size).memory / MIB,
    }


def training(overrides: list[str], size: tuple[int, int], batch: int, static: str) -> float:
    """MiB at the highest point of two steps."""
    before = _ready(overrides, batch, static)
    step = step_of(overrides, size, batch, static)
    for _ in range(2):
        step.train()
    return _most() - before


def inference(overrides: list[str], size: tuple[int, int], batch: int) -> float:
    """MiB at the highest point of one."""
    before = _ready(overrides, batch, STATIC)
    step = step_of(overrides, size, batch, STATIC)
    step.infer()
    return _most() - before


def _ready(overrides: list[str], batch: int, static: str) -> float:
    """MiB of this process, once everything has run in small."""
    step = step_of(overrides, (128, 128), batch, static)
    step.train()
    step.infer()
    del step
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the highest point begins anew
    return _most()


def _most() -> float:
    return report.peak()


def measured(name: str) -> dict[str, float]:
    """MiB of a case: estimated and measured."""
    case = CASES[name]
    own = {f"estimated {what}": value for what, value in report.alone(estimated, *case).items()}
    return own | {
        "training": report.alone(training, *case, STATIC),
        "as it comes": report.alone(training, *case, AS_IT_COMES),
        "inference": report.alone(inference, *case),
    }


def markdown(numbers: dict[str, dict[str, float]]) -> str:
    rows = []
    for name, own in numbers.items():
        _, (height, width), batch = CASES[name]
        training, inference = (
            [f"{own[f'estimated {what}']:.0f}", f"{own[what]:.0f}", f"{off(own, what):+.1%}"] for what in PHASES
        )
        rows.append([name, f"{batch} x {height} x {width}", *training, f"{own['as it comes']:.0f}", *inference])
    head = ["", "batch", "training, MiB", "measured", "off by", "as it comes", "inference, MiB", "measured", "off by"]
    about = (
        f"{OBJECTS} objects an image, float32, with the optimizer's state. As it comes: measured with {AS_IT_COMES}. "
        f"`make bench NAME=training/memory`, {date.today()}, {report.machine()}."
    )
    return f"{report.table(head, rows)}\n\n{about}"


PHASES = ("training", "inference")


def off(own: dict[str, float], what: str) -> float:
    """By which share the estimate is too high."""
    return own[f"estimated {what}"] / own[what] - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES), metavar="NAME")
    options = parser.parse_args()
    numbers = {name: measured(name) for name in track(options.cases, "Memory")}
    report.write("memory", markdown(numbers), numbers)


if __name__ == "__main__":
    main()
