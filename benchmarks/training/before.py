"""Training steps and inference of this tree beside those of another one, such as an earlier commit.

    git worktree add ../before COMMIT && python -m benchmarks training/before --tree ../before

Two processes, one for each tree, which take steps in turns on the same images, objects and weights.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from rich.progress import track

from benchmarks import report

HERE = Path(__file__).parents[2]
WARMUP = 2


class Case(NamedTuple):
    overrides: tuple[str, ...]
    size: tuple[int, int]
    batch: int


CASES = {
    "demo, 8 x 128 x 128": Case(("experiment=demo",), (128, 128), 8),
    "Deformable DETR, two stages": Case(("model=deformable_detr_two_stage",), (512, 512), 1),
    "Co-Deformable-DETR, K = 2": Case(("model=co_deformable",), (512, 512), 1),
    "Conditional DETR": Case(("model=conditional_detr",), (512, 512), 1),
    "Conditional DETR, 11 groups": Case(("model=conditional_detr", "model.query_groups=11"), (512, 512), 1),
}
# What runs in both trees, and so uses nothing that only one of them has.
SERVER = """
import json, sys, time
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from torch.utils._python_dispatch import TorchDispatchMode
from codetr.types import Frames, Targets

overrides, (height, width), batch = json.loads(sys.stdin.readline())
with initialize_config_module("codetr.conf", version_base="1.3"):
    config = compose("train", [*overrides, "model.detector.backbone.pretrained=false", "model.num_classes=80"])
torch.manual_seed(0)
detector = instantiate(config.model.detector, _convert_="all")
criterion = instantiate(config.criterion, _convert_="all")
optimizer = instantiate(config.optimizer)(detector, fused=True)
boxes = torch.cat([torch.rand(batch, 8, 2) * 0.6 + 0.2, torch.rand(batch, 8, 2) * 0.3 + 0.05], -1)
sizes = torch.tensor([[height, width]] * batch)
labels, valid = torch.randint(80, (batch, 8)), torch.ones(batch, 8, dtype=torch.bool)
images = torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8)
padding = torch.zeros(batch, height, width, dtype=torch.bool)


def train():
    targets = Targets(boxes, labels, valid, Frames.unscaled(sizes))  # a batch is never seen twice
    loss = torch.stack(list(criterion(detector(images, padding, targets), targets).values())).sum()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(detector.parameters(), config.trainer.gradient_clip_val or 1e9)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def infer():
    detector.eval()
    with torch.inference_mode():
        detector.detect(images, padding)
    detector.train()


class Calls(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


for line in sys.stdin:
    what, start = line.strip(), time.perf_counter()
    if what == "calls":
        with Calls() as calls:
            train()
        answer = calls.count
    else:
        loss = train() if what == "train" else infer()
        answer = [time.perf_counter() - start, loss]
    print(json.dumps(answer), flush=True)
"""


class Tree:
    """A process in which a tree's code runs."""

    def __init__(self, folder: Path, case: Case) -> None:
        subprocess.run(["make", "-s", "links"], cwd=folder, check=True)
        # Threads that wait must not spin: the other process has its turn meanwhile.
        environment = {**os.environ, "PYTHONPATH": str(folder / "build" / "site"), "OMP_WAIT_POLICY": "passive"}
        command = [sys.executable, "-W", "ignore", "-c", SERVER]
        self.process = subprocess.Popen(
            command, cwd=folder, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._say(json.dumps(case))

    def ask(self, what: str) -> Any:
        self._say(what)
        assert self.process.stdout is not None
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit("the tree's process ended; its error is above")
        return json.loads(answer)

    def close(self) -> None:
        self.process.communicate()

    def _say(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()


def measure(case: Case, trees: dict[str, Path], repeats: int) -> dict[str, dict[str, Any]]:
    """Per tree: medians of seconds, operator calls of a step, and the loss of the first one."""
    running = {name: Tree(folder, case) for name, folder in trees.items()}
    times: dict[str, dict[str, list]] = {name: {"train": [], "infer": []} for name in trees}
    for what in ("train", "infer"):
        for _ in track(range(repeats + WARMUP), f"{' '.join(case.overrides)}: {what}"):
            for name, tree in running.items():
                times[name][what].append(tree.ask(what))
    found = {
        name: {
            "loss": own["train"][0][1],
            "calls": running[name].ask("calls"),
            **{what: statistics.median(seconds for seconds, _ in own[what][WARMUP:]) for what in own},
        }
        for name, own in times.items()
    }
    for tree in running.values():
        tree.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, required=True, help="a checkout of the other commit")
    parser.add_argument("--repeat", type=int, default=7)
    options = parser.parse_args()
    trees = {"before": options.tree.resolve(), "after": HERE}
    numbers = {name: measure(case, trees, options.repeat) for name, case in CASES.items()}
    commits = {name: _commit(folder) for name, folder in trees.items()}
    report.write("before", markdown(numbers, commits, options.repeat), {"commits": commits, "cases": numbers})


def _commit(folder: Path) -> str:
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


def markdown(numbers: dict[str, dict[str, dict[str, Any]]], commits: dict[str, str], repeats: int) -> str:
    rows = []
    for name, own in numbers.items():
        before, after = own["before"], own["after"]
        cells = [name]
        for what in ("train", "infer"):
            seconds = [f"{x[what] * 1e3:.0f}" for x in (before, after)]
            cells += [*seconds, f"{before[what] / after[what]:.2f}"]
        rows.append(
            [*cells, f"{before['calls']}", f"{after['calls']}", f"{abs(after['loss'] / before['loss'] - 1):.1g}"]
        )
    head = ["", "step before, ms", "after", "times faster", "inference before, ms", "after", "times faster"]
    head += ["operator calls before", "after", "the first loss differs by"]
    about = (
        f"Medians of {repeats} steps in turns, of {commits['before']} and {commits['after']}; 512 x 512, batch 1 where "
        f"nothing else is said; {date.today()}, {report.machine()}."
    )
    return f"{report.table(head, rows)}\n\n{about}"
