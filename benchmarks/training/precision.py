"""Half precision beside float32: losses of training runs in bf16, gradients of every detector in bf16 and in fp16.

curves: a small Co-Deformable-DETR and a small Co-DINO on the embedded data set, from scratch: the same weights, images
and seed in bf16 and in float32. gradients: one step of every detector at toy size (tests/precision_cases.py), also on
inputs that are likely to overflow. Each study keeps its part of results/precision.json; the tables are of both.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from hydra.utils import instantiate
from rich.progress import track
from torch import Tensor, nn

from benchmarks import report
from codetr.application import compose
from codetr.types import Batch

sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))

from precision_cases import CASES, Decisions, Step, build, hostile, off, step

MODELS = {"Co-Deformable-DETR": "co_deformable_tiny", "Co-DINO": "co_dino"}
# (dtype of autocast, seed of the draws; None: those that follow the weights'). The last shows what chance alone does.
RUNS: dict[str, tuple[torch.dtype | None, int | None]] = {
    "float32": (None, None),
    "bf16": (torch.bfloat16, None),
    "float32, other draws": (None, 1),
}
HALVES = {"bf16": (torch.bfloat16, 1.0), "fp16": (torch.float16, 2.0**16)}  # with the scale that a scaler begins with
WINDOW = 50  # steps whose median is told and drawn
SMALL = (
    "model/backbone=resnet10_small",
    "model.detector.backbone.arguments.channels=[16,32,64,64]",
    "model/auxiliary_head=[faster_rcnn_small,atss]",
    "model.width=32",
    "model.num_heads=2",
    "model.ffn_width=64",
    "model.norm_groups=4",
    "model.dropout=0",
    "model.detector.encoder.num_layers=1",
    "model.detector.decoder.num_layers=2",
    "model.detector.main.num_queries=30",
    "data=shapes_tiny",
    "data.batch_size=2",
    "optimizer.lr=1e-3",
    "trainer.gradient_clip_val=20",
)


def train(model: str, dtype: torch.dtype | None, draws: int | None, steps: int, folder: Path) -> dict[str, Any]:
    """The loss of every step, and the seconds of all. dtype, draws: see `RUNS`."""
    config = compose("train", [f"model={model}", *SMALL, f"paths.data_dir={folder}"])
    data = instantiate(config.data)
    data.prepare_data()
    data.setup("fit")
    config.model.num_classes = len(data.class_names)
    torch.manual_seed(0)
    detector = instantiate(config.model.detector, _convert_="all")
    criterion = instantiate(config.criterion, _convert_="all")
    optimizer = instantiate(config.optimizer)(detector, fused=True)
    if draws is not None:
        torch.manual_seed(draws)
    losses, begin = [], time.monotonic()
    for batch in itertools.islice(_batches(data), steps):
        loss = _loss(detector, criterion, batch, dtype)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(detector.parameters(), config.trainer.gradient_clip_val)
        optimizer.step()
        losses.append(float(loss.detach()))
    return {"losses": losses, "seconds": time.monotonic() - begin}


def _batches(data: Any) -> Iterator[Batch]:
    while True:
        yield from data.train_dataloader()


def _loss(detector: nn.Module, criterion: nn.Module, batch: Batch, dtype: torch.dtype | None) -> Tensor:
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        output = detector(batch.images, batch.padding, batch.targets)
        return torch.stack(list(criterion(output, batch.targets).values())).sum()


def curves(steps: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        return {
            f"{name}, {run}": train(model, *how, steps, Path(folder))
            for name, model in MODELS.items()
            for run, how in RUNS.items()
        }


def gradients() -> dict[str, Any]:
    """detector -> input -> precision -> what the step found, and per part how far its gradient is off."""
    found: dict[str, Any] = {}
    for model, heads in track(CASES, "Gradients"):
        detector, criterion = build(model, heads)
        own = found[f"{model} with heads" if heads else model] = {}
        for kind, inputs in hostile().items():
            decisions = Decisions()
            with decisions.made():
                reference = step(detector, criterion, inputs, None)
            own[kind] = {"float32": {"loss": reference.loss, "finite": reference.finite}}
            for name, (dtype, scale) in HALVES.items():
                with decisions.taken():
                    own[kind][name] = _compared(step(detector, criterion, inputs, dtype, scale), reference)
    return found


def _compared(found: Step, reference: Step) -> dict[str, Any]:
    return {
        "loss": found.loss,
        "finite": found.finite,
        "scale": found.scale,
        "off": {name: off(found.gradients[name], reference.gradients[name]) for name in reference.gradients},
    }


def plot(record: dict[str, Any], path: Path) -> None:
    figure, axes = plt.subplots(1, len(MODELS), figsize=(9, 3), layout="constrained")
    for axis, name in zip(axes, MODELS, strict=True):
        for run in RUNS:
            losses = record[f"{name}, {run}"]["losses"]
            (line,) = axis.plot(losses, linewidth=0.4, alpha=0.4)
            axis.plot(_smooth(losses), linewidth=1.5, color=line.get_color(), label=run)
        axis.set(title=name, xlabel="step", ylabel="loss")
        axis.legend()
    figure.savefig(path, dpi=100)


def _smooth(losses: list[float]) -> list[float]:
    """Medians of the last steps before each."""
    return [statistics.median(losses[max(0, i - WINDOW + 1) : i + 1]) for i in range(len(losses))]


def curves_table(record: dict[str, Any]) -> str:
    rows = []
    for name in MODELS:
        base = record[f"{name}, float32"]["losses"]
        for run in RUNS:
            losses = record[f"{name}, {run}"]["losses"]
            medians = [statistics.median(part) for part in (losses[:WINDOW], losses[-WINDOW:])]
            away = medians[1] / statistics.median(base[-WINDOW:]) - 1
            rows.append([name, run, *(f"{m:.2f}" for m in medians), f"{losses[-1]:.2f}", f"{away:+.1%}"])
    count = len(next(iter(record.values()))["losses"])
    head = ["", "run", f"loss, steps 1 to {WINDOW}", f"steps {count - WINDOW + 1} to {count}", "last step"]
    return report.table([*head, "to float32"], rows)


def gradients_table(record: dict[str, Any]) -> str:
    """Per detector, bf16 / fp16: parts of a kind by their worst one."""
    kinds = ("backbone", "neck", "encoder", "adapter", "heads", "queries", "decoder")
    rows = []
    for name, inputs in record.items():
        usual = inputs["usual"]
        cells = [" / ".join(_worst(usual[half]["off"], kind) for half in HALVES) for kind in kinds]
        finite = all(found["finite"] for own in inputs.values() for found in own.values())
        scales = [own["fp16"]["scale"] for own in inputs.values()]
        rows.append([name, *cells, "yes" if finite else "NO", f"{usual['fp16']['scale']:.0f}", f"{min(scales):.0f}"])
    return report.table(["detector", *kinds, "finite on all inputs", "fp16 scale", "lowest"], rows)


def _worst(found: dict[str, float], kind: str) -> str:
    values = [value for name, value in found.items() if name.split(".")[0] == kind]
    return f"{100 * max(values):.1f}" if values else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", nargs="?", choices=("curves", "gradients"), help="one of the two; both without")
    parser.add_argument("--steps", type=int, default=500)
    options = parser.parse_args()
    torch.set_num_threads(1)
    studies = {"curves": lambda: curves(options.steps), "gradients": gradients}
    for name in [options.study] if options.study else studies:
        found = studies[name]()
        path = report.folder / "precision.json"  # read last: the other study may have been written meanwhile
        record = json.loads(path.read_text()) if path.exists() else {}
        write(_rounded(record | {name: found}))


def _rounded(record: Any) -> Any:
    """All floats in it to six digits."""
    if isinstance(record, dict):
        return {key: _rounded(value) for key, value in record.items()}
    if isinstance(record, list):
        return [_rounded(value) for value in record]
    return float(f"{record:.6g}") if isinstance(record, float) else record


def write(record: dict[str, Any]) -> None:
    """The tables and the picture of the studies that are there."""
    texts = []
    if "curves" in record:
        plot(record["curves"], report.folder / "precision.png")
        texts.append(curves_table(record["curves"]))
        texts.append(
            f"Medians of {WINDOW} steps of two images of sixteen, from the same weights; draws among boxes differ as "
            "soon as rounding has changed one."
        )
    if "gradients" in record:
        texts.append(gradients_table(record["gradients"]))
        inputs = ", ".join(next(iter(record["gradients"].values())))
        texts.append(
            "Distance of a gradient from that of float32, in % of its norm, bf16 / fp16, of the worst part of each "
            f"kind, on usual inputs, with the same decisions. All inputs: {inputs}. Scale: of the loss, the highest "
            "power of two up to 65,536 with which all gradients of fp16 are finite; lowest: of all inputs."
        )
    texts.append(f"`make bench NAME=training/precision`, {date.today()}, {report.machine()}, autocast of the CPU.")
    report.write("precision", "\n\n".join(texts), record)


if __name__ == "__main__":
    main()
