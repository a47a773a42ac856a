"""Time, memory, operator calls and arithmetic of a training step, part by part, and beside other libraries.

  codetr benchmark step experiment=demo size=[128,128] batch=8
  codetr benchmark step experiment=deformable_detr_r50 against=[transformers/deformable_detr]
  codetr benchmark step experiment=co_deformable_r50_12e size=[800,1333] batch=2 trainer=gpu out=measured

Random images, objects and weights. Takes what training takes: the model, its losses, optimizer and precision
(trainer.precision=32-true|bf16-mixed|16-mixed) and device (trainer.accelerator=auto|cpu|gpu).

  size=[512,512]    (height, width) of the images
  batch=1           images of a step
  objects=8         of the first image; the others have three less
  repeats=5         measured steps of each, in turns
  against=[]        other detectors, in turns with ours: transformers/deformable_detr, .../conditional_detr,
                    .../dab_detr, .../rt_detr, .../mask2former, rfdetr/nano, .../small, .../medium (packages that you
                    install), and reference: ours with deformable attention in plain PyTorch
  inference=true    false: only training steps
  profile=true      false: only the times
  out=null          out=measured: also into measured.md and measured.json
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from codetr.benchmark.timing import Measured
    from codetr.costs.step import Step

REFERENCE = "reference"


def main(overrides: list[str]) -> int:
    """Raises UserError for a configuration that is none, a device that is absent, and rivals that are not there."""
    from codetr import application
    from codetr.benchmark import report

    config = application.compose("benchmark", overrides)
    result = measure(config)
    result["command"] = " ".join(["codetr benchmark step", *overrides])
    report.show(report.page(result), result, Path(config.out) if config.out else None)
    return 0


def measure(config: DictConfig) -> dict[str, Any]:
    """Everything in plain containers."""
    from datetime import date

    import torch

    from codetr.benchmark import parts, report, rivals
    from codetr.benchmark.timing import arithmetic, device_of, in_turns, medians
    from codetr.benchmark.waits import host_waits
    from codetr.costs.step import Step, draw, with_classes, without_pretrained
    from codetr.derived import read_needed_masks

    device, classes = device_of(config.trainer.accelerator), with_classes(config)
    read_needed_masks(config)
    inputs = draw(config.batch, tuple(config.size), config.objects, classes, device, config.data.masks)
    step = Step(without_pretrained(config), inputs, classes, device)
    cases: dict[str, Measured] = {"ours": step}
    for name in config.against:
        if name == REFERENCE:
            cases[name] = _WithReference(step)
        else:
            cases[name] = rivals.build(name, inputs, classes, step.precision, config.model.dropout)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step.train()
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    train = in_turns({n: c.train for n, c in cases.items()}, config.repeats, device, "Training steps")
    times = {"training step": medians(train)}
    if config.inference:
        infer = in_turns({n: c.infer for n, c in cases.items()}, config.repeats, device, "Inference")
        times["inference"] = medians(infer)
    measured = parts.measure(step) if config.profile else None
    return {
        "date": date.today().isoformat(),
        "surroundings": report.surroundings(device),
        "size": list(config.size),
        "batch": config.batch,
        "repeats": config.repeats,
        "times": times,
        "peak": peak,
        "arithmetic": arithmetic(device, step.precision) if config.profile else 0.0,
        "parts": {n: vars(p) for n, p in measured.parts.items()} if measured else {},
        "operators": measured.operators if measured else [],
        "waits": host_waits(step) if config.profile else None,
    }


class _WithReference:
    """Ours, with deformable attention in plain PyTorch."""

    def __init__(self, step: Step) -> None:
        self.step = step

    def train(self) -> None:
        with _implementation(REFERENCE):
            self.step.train()

    def infer(self) -> None:
        with _implementation(REFERENCE):
            self.step.infer()


@contextmanager
def _implementation(name: str) -> Iterator[None]:
    before = os.environ.get("CODETR_MSDA")
    os.environ["CODETR_MSDA"] = name
    yield
    os.environ.pop("CODETR_MSDA")
    if before is not None:
        os.environ["CODETR_MSDA"] = before
