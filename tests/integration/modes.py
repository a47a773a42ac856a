"""Every mode in which a detector trains, as rows of a covering array, and what one row does.

`make modes` runs all rows and writes docs/modes.md.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import warnings
from dataclasses import asdict, dataclass
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests"))

import forked  # noqa: E402
from fixed_draws import fixed_draws  # noqa: E402
from toy import environment, make_coco, overrides  # noqa: E402

PAGE = """# Modes

Written by `make modes`: every two values of the six settings in a row of this table, on the CPU with models of toy
size; `tests/integration/test_modes.py` runs a part of it in `make test` and all of it in `make test-all`. A row takes
two steps, each with a validation of three images (which two processes do not share evenly) and a checkpoint, is
resumed, and takes a third step. The difference is the largest relative one of three losses to those of float32 on one
process, with the same images, weights and draws: float32 sums in another order; bfloat16 rounds at 0.2 %, more where a
match, an assignment or a top k changes with it. `gpu` is that configuration with `trainer.accelerator=cpu`; `ddp` and
`fsdp` are two processes on gloo. `16-mixed` and CUDA are refused on such a machine with a sentence, before any data is
read.

"""
# Without those of masks, whose losses are at points that are drawn.
NOT_HERE = ("base", "mask2former", "mask2former_tiny")
MODELS = tuple(sorted(p.stem for p in (ROOT / "conf" / "model").glob("*.yaml") if p.stem not in NOT_HERE))
DENOISING = ("co_dino", "dino", "dino_5scale", "dn_deformable_detr", "dn_detr")
PROCESSES = {"default": 1, "cpu": 1, "gpu": 1, "ddp": 2, "fsdp": 2}
FACTORS: dict[str, tuple[Any, ...]] = {
    "model": MODELS,
    "trainer": tuple(PROCESSES),
    "precision": ("32-true", "bf16-mixed", "bf16-true"),
    "accumulate": (1, 2),
    "clip": (None, 0.1),
    "ema": (True, False),
}
WITHOUT_CHECKPOINTS = ("~callbacks.checkpoints", "+trainer.enable_checkpointing=false")
TRAIN, VAL, STEPS, RESUMED = 4, 3, 3, 2


@dataclass(frozen=True)
class Row:
    model: str
    trainer: str
    precision: str
    accumulate: int
    clip: float | None
    ema: bool

    def __str__(self) -> str:
        return "-".join(str(value) for value in asdict(self).values())

    @property
    def reference(self) -> Row:
        """In float32 on one process; an average does not change the losses."""
        return Row(self.model, "cpu", "32-true", self.accumulate, self.clip, False)


def pairs(row: dict[str, Any]) -> set[frozenset[tuple[str, Any]]]:
    return {frozenset(pair) for pair in combinations(row.items(), 2)}


def covering(factors: dict[str, tuple[Any, ...]]) -> list[dict[str, Any]]:
    """Rows in which every two values of two factors meet: greedily, each from a pair that is still missing, with the
    values that meet most of the missing ones, and of equal ones those that were seen least."""
    missing = {
        frozenset({(a, x), (b, y)}): None for a, b in combinations(factors, 2) for x in factors[a] for y in factors[b]
    }
    rows: list[dict[str, Any]] = []
    while missing:
        row: dict[str, Any] = dict(next(iter(missing)))
        for name in factors:
            if name not in row:
                row[name] = max(factors[name], key=lambda value: _gain(row, name, value, missing, rows))
        rows.append({name: row[name] for name in factors})
        for pair in pairs(row):
            missing.pop(pair, None)
    return rows


def _gain(row: dict[str, Any], name: str, value: Any, missing: Any, rows: list[dict[str, Any]]) -> tuple[int, int]:
    met = sum(pair in missing for pair in pairs(row | {name: value}))
    return met, -sum(other[name] == value for other in rows)


@cache
def rows() -> tuple[Row, ...]:
    return tuple(Row(**row) for row in covering(FACTORS))


class Record(Callback):
    """Per process, into `directory`: the loss of every batch of a fit, and the evaluation after it."""

    def __init__(self, directory: str) -> None:
        self.directory = Path(directory)
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, *_: Any) -> None:
        self.losses.append(float(outputs["loss"]))

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        path = self.directory / f"losses_{trainer.global_rank}_{trainer.global_step}.json"
        path.write_text(json.dumps(self.losses))

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        evaluation = module.metrics["val"].evaluations["bbox"]
        content = {"images": evaluation.images, "numbers": evaluation.numbers}
        path = self.directory / f"evaluation_{trainer.global_rank}.json"
        path.write_text(json.dumps(content))


def settings(row: Row, data: Path, directory: Path) -> list[str]:
    """Of `codetr.train`, without anything random: images, weights and targets are those of the reference. And without
    negatives that fill up the positive queries: to the most of a process's batch, so that processes change them."""
    noises = [f"model.detector.queries.denoising.{noise}_noise=0" for noise in ("label", "box")]
    return [
        *overrides(data),
        f"model={row.model}",
        "model.detector.backbone.name=resnet10t",
        "model.detector.backbone.norm=frozen",
        "model.dropout=0",
        f"trainer={row.trainer}",
        "trainer.accelerator=cpu",
        f"trainer.precision={row.precision}",
        f"trainer.accumulate_grad_batches={row.accumulate}",
        f"trainer.limit_train_batches={row.accumulate}",
        f"trainer.gradient_clip_val={'null' if row.clip is None else row.clip}",
        f"data.batch_size={2 // PROCESSES[row.trainer]}",
        "data.eval_batch_size=1",
        "schedule.warmup_steps=0",
        "logger=csv",
        *([] if row.ema else ["~callbacks.ema"]),
        "~callbacks.progress",
        f"+callbacks.record={{_target_: modes.Record, directory: {directory}}}",
        f"run_dir={directory}",
        *(noises if row.model in DENOISING else []),
        "model.detector.collaborative.fill=none",
        *(["model/auxiliary_head=[faster_rcnn_small,atss]"] if row.model in ("co_deformable", "co_dino") else []),
    ]


def run(row: Row, data: Path, directory: Path) -> None:
    """Two steps, each with a validation and a checkpoint, then a resume and a third."""
    given = settings(row, data, directory)
    _train([*given, f"trainer.max_epochs={RESUMED}"], directory)
    _train([*given, f"trainer.max_epochs={STEPS}", "resume=auto"], directory)


def run_reference(row: Row, data: Path, directory: Path) -> None:
    """The losses of three steps, and nothing else."""
    given = settings(row, data, directory)
    _train([*given, f"trainer.max_epochs={STEPS}", "trainer.limit_val_batches=0", *WITHOUT_CHECKPOINTS], directory)


def _train(given: list[str], directory: Path) -> None:
    from codetr.application import compose
    from codetr.training import fit

    directory.mkdir(parents=True, exist_ok=True)
    with fixed_draws():
        fit(compose("train", given))


def losses(row: Row, directory: Path) -> list[float]:
    """Of the steps, over all processes and accumulated batches."""
    fits = sorted({path.stem.rpartition("_")[2] for path in directory.glob("losses_*.json")})
    parts = []
    for step in fits:
        paths = [directory / f"losses_{rank}_{step}.json" for rank in range(PROCESSES[row.trainer])]
        parts.append(torch.tensor([json.loads(path.read_text()) for path in paths]).mean(0))
    return torch.cat(parts).view(-1, row.accumulate).mean(1).tolist()


def evaluations(row: Row, directory: Path) -> list[dict[str, Any]]:
    """Of every process: `images` that were counted, and `numbers`."""
    paths = [directory / f"evaluation_{rank}.json" for rank in range(PROCESSES[row.trainer])]
    return [json.loads(path.read_text()) for path in paths]


def run_in_processes(chosen: list[Row], data: Path, folder: Path) -> None:
    """Rows of several processes, one after the other in the same two."""
    jobs = json.dumps([asdict(row) for row in chosen])
    limit = 300 + 300 * len(chosen)
    forked.run_two("modes", jobs, str(data), str(folder), cwd=Path(__file__).parent, env=environment(), timeout=limit)


def worker(jobs: str, data: str, folder: str) -> None:
    for values in json.loads(jobs):
        row = Row(**values)
        run(row, Path(data), Path(folder) / str(row))


def off(found: list[float], expected: list[float]) -> float:
    """The largest relative difference."""
    return max(abs(a - b) / b for a, b in zip(found, expected, strict=True))


def table(folder: Path) -> str:
    """Run every row; Markdown."""
    data = folder / "data"
    make_coco(data, train=TRAIN, val=VAL)
    for trainer in ("ddp", "fsdp"):
        run_in_processes([row for row in rows() if row.trainer == trainer], data, folder)
    for row in rows():
        if PROCESSES[row.trainer] == 1:
            run(row, data, folder / str(row))
        if not (folder / "reference" / str(row.reference)).exists():
            run_reference(row.reference, data, folder / "reference" / str(row.reference))
    lines = [f"| {' | '.join(FACTORS)} | losses | float32, one process | difference |"]
    lines.append("|---" * (len(FACTORS) + 3) + "|")
    for row in sorted(rows(), key=lambda row: (row.trainer, row.precision, row.model)):
        found = losses(row, folder / str(row))
        expected = losses(row.reference, folder / "reference" / str(row.reference))
        cells = [*asdict(row).values(), *(", ".join(f"{x:.3f}" for x in values) for values in (found, expected))]
        lines.append(f"| {' | '.join(str(cell) for cell in cells)} | {off(found, expected):.1e} |")
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        worker(*sys.argv[1:])
    else:
        os.environ |= environment()
        warnings.simplefilter("ignore")
        with tempfile.TemporaryDirectory() as scratch:
            text = table(Path(scratch))
        (ROOT / "docs" / "modes.md").write_text(PAGE + text + "\n")
