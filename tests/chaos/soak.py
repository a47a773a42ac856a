"""`make soak`: a long toy training. Memory, file descriptors and threads of the trainer and its workers stay flat.

Figures into benchmarks/results/soak.json, a plot beside it. Exit status 1 when something grew.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from lightning.pytorch import Callback, Trainer

from codetr import application
from codetr.training import fit
from toy import make_coco, overrides

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
SAMPLES = 200
CURVES = ("RSS of the trainer, MB", "PSS of the workers, MB", "file descriptors", "threads")
# Growth from the second quarter to the last one that still counts as flat: noise of the allocator, and nothing else.
TOLERATED = (0.03, 0.05, 0, 0)


class Sample(Callback):
    """A line [step, validations, *CURVES] into `file`, every so many steps."""

    def __init__(self, every: int, file: str) -> None:
        self.every, self.file, self.validations = every, Path(file), 0

    def on_validation_end(self, *_: Any) -> None:
        self.validations += 1

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step % self.every == 0:
            with self.file.open("a") as file:
                file.write(json.dumps([trainer.global_step, self.validations, *measure()]) + "\n")


def measure() -> list[float]:
    """CURVES of now. Descriptors and threads are of this process."""
    own = Path("/proc/self")
    pss = sum(_kilobytes(Path("/proc") / pid / "smaps_rollup", "Pss:") for pid in _children())
    rss = _kilobytes(own / "smaps_rollup", "Rss:")
    return [rss / 1e3, pss / 1e3, len(list((own / "fd").iterdir())), len(list((own / "task").iterdir()))]


def _children() -> list[str]:
    tasks = Path("/proc/self/task").iterdir()
    return [pid for task in tasks for pid in (task / "children").read_text().split()]


def _kilobytes(file: Path, name: str) -> int:
    try:
        return next(int(line.split()[1]) for line in file.read_text().splitlines() if line.startswith(name))
    except (OSError, StopIteration):  # ended meanwhile
        return 0


def soak(steps: int, validations: int, folder: Path) -> list[list[float]]:
    """The rows of a training of so many steps, with a validation and a checkpoint at the end of every epoch."""
    make_coco(folder / "data", train=steps // validations, val=8)
    options = [
        "data.batch_size=1",
        "data.num_workers=2",
        f"trainer.max_epochs={validations}",
        f"callbacks.checkpoints.every_n_steps={steps // validations // 2}",
        "trainer.log_every_n_steps=10",
        f"run_dir={folder}/run",
        "logger=default",
    ]
    file = folder / "rows"
    every = max(steps // SAMPLES, 1)
    options.append(f"+callbacks.sample={{_target_: chaos.soak.Sample, every: {every}, file: {file}}}")
    fit(application.compose("train", [*overrides(folder / "data"), *options]))
    return [json.loads(line) for line in file.read_text().splitlines()]


def growth(rows: list[list[float]]) -> list[float]:
    """Of each curve, the median of the last quarter of the steps over that of the second, less one."""
    table = np.array(rows)[:, 2:]
    quarter = len(table) // 4
    before, after = (np.median(part, 0) for part in (table[quarter : 2 * quarter], table[-quarter:]))
    return (after / before - 1).tolist()


def plot(rows: list[list[float]], path: Path) -> None:
    table = np.array(rows)
    figure, axes = plt.subplots(1, len(CURVES), figsize=(12, 2.6), layout="constrained")
    for axis, name, values in zip(axes, CURVES, table.T[2:], strict=True):
        axis.plot(table[:, 0], values, linewidth=1)
        axis.set(title=name, xlabel="step", ylim=(0, 1.25 * max(values)))
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--validations", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ |= {"OMP_NUM_THREADS": "1", "CODETR_MSDA": "reference"}
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        rows = soak(options.steps, options.validations, Path(folder))
    grown = dict(zip(CURVES, growth(rows), strict=True))
    figures = {"seconds": round(time.monotonic() - begin), "growth": grown}
    text = json.dumps(figures | {"columns": ["step", "validations", *CURVES]})[:-1]
    lines = ",\n".join(json.dumps([round(value, 1) for value in row]) for row in rows)
    (RESULTS / "soak.json").write_text(f'{text}, "rows": [\n{lines}\n]}}\n')
    plot(rows, RESULTS / "soak.png")
    for name, share in grown.items():
        print(f"{name}: {share:+.1%} from the second quarter to the last")
    raise SystemExit(any(share > most for share, most in zip(grown.values(), TOLERATED, strict=True)))


if __name__ == "__main__":
    main()
