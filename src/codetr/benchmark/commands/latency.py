"""Latency, images per second and memory of inference: PyTorch, ONNX Runtime, OpenVINO, and other libraries, in turns.

  codetr benchmark latency checkpoint=best.ckpt size=[800,1344] batches=[1,4]
  codetr benchmark latency experiment=co_deformable_r50_12e runtimes=[eager,openvino] out=latency
  codetr benchmark latency model=deformable_pp against=[transformers/deformable_detr,transformers/rt_detr]

From JPEG files to objects in their pixels, stage by stage: decoding, preprocessing, the graph of `codetr export`, and
post-processing. Other libraries go the same way, in graphs made the same way, with random weights. Float32.

  checkpoint=null       a file of codetr.train or codetr.convert; else the model that is composed, with random weights
  size=[640,640]        (height, width) of the images that the network sees
  batches=[1]           images at once
  runtimes=[...]        of eager, compile (torch.compile), onnxruntime, openvino
  against=[]            transformers/deformable_detr, .../conditional_detr, .../dab_detr, .../rt_detr, rfdetr/nano,
                        .../small, .../medium (packages that you install)
  repeats=20            measured runs of each, in turns
  out=null              out=latency: also into latency.md and latency.json
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from omegaconf import DictConfig

    from codetr.benchmark.graphs import Drawn
    from codetr.benchmark.latency import Run, Stages

OURS = "ours"


def main(overrides: list[str]) -> int:
    """Raises UserError for a configuration that is none, for what cannot be exported, and for what is not installed."""
    from codetr import application
    from codetr.benchmark import latency_report, report

    config = application.compose("latency", overrides)
    result = measure(config)
    result["command"] = " ".join(["codetr benchmark latency", *overrides])
    report.show(latency_report.page(result), result, Path(config.out) if config.out else None)
    return 0


def measure(config: DictConfig) -> dict[str, Any]:
    """Everything in plain containers."""
    from datetime import date

    from codetr.benchmark import latency, report
    from codetr.benchmark.timing import device_of

    latency.check_runtimes(config.runtimes)
    device, size = device_of(config.trainer.accelerator), (int(config.size[0]), int(config.size[1]))
    rows: list[dict[str, Any]] = []
    operators: dict[str, Any] = {}
    for batch in config.batches:
        with tempfile.TemporaryDirectory() as folder:
            stages = latency.Stages(Path(folder), batch, size)
            found, shares = _of_batch(config, stages, Path(folder), device)
        rows += [{"batch": batch, **row} for row in found]
        operators |= {f"{name}, batch {batch}": own for name, own in shares.items()}
    return {
        "date": date.today().isoformat(),
        "surroundings": report.surroundings(device),
        "size": list(size),
        "repeats": config.repeats,
        "rows": rows,
        "operators": operators,
    }


def _of_batch(
    config: DictConfig, stages: Stages, folder: Path, device: torch.device
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A row for every detector and runtime, and the operators of the exported graphs."""
    from codetr.benchmark import latency

    detectors = _drawn(config, stages)
    cases: dict[str, tuple[Drawn, Run]] = {}
    rows: dict[str, dict[str, Any]] = {}
    shares: dict[str, Any] = {}
    for name, drawn in detectors.items():
        file = folder / f"{len(cases)}.onnx"
        if set(config.runtimes) & set(latency.SUFFIXES):
            drawn.write(file)
        for runtime in config.runtimes:
            key = f"{name}, {runtime}"

            def first(key: str = key, runtime: str = runtime, drawn: Drawn = drawn, file: Path = file) -> None:
                cases[key] = drawn, latency.opened(runtime, drawn, file, device)
                stages.run(*cases[key])

            grown = latency.memory(first)
            if grown is not None and runtime in latency.OWN:
                grown += latency.weights_of(drawn.graph)  # which are there already
            rows[key] = {"detector": name, "runtime": runtime, "memory": grown}
        if "onnxruntime" in config.runtimes:
            shares[name] = latency.operators(file, stages.blank(), stages.sizes)
    runs = latency.in_turns(cases, stages, config.repeats)
    return [row | latency.summary(runs[key], len(stages.files)) for key, row in rows.items()], shares


def _drawn(config: DictConfig, stages: Stages) -> dict[str, Drawn]:
    from codetr.benchmark import graphs

    own = graphs.ours(config, stages.size)
    others = {
        name: graphs.rival(name, own.classes, stages.size, len(stages.files), own.postprocess)
        for name in config.against
    }
    return {OURS: own, **others}
