"""What a lower precision costs: AP and speed of an exported file beside those of its checkpoint, on the same images."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from codetr import application
from codetr.eval import evaluate
from codetr.inference import Exported, Model, load
from codetr.inference.runtimes import RUNTIMES
from codetr.inference.sources import Images, Unreadable, collate_items, find_sources
from codetr.types import Batch

WARNED = 0.5  # points of AP that a precision may cost before there is a warning
_TIMED, _ROUNDS = 5, 3  # images, and how often


def compare(config: DictConfig, out: Path) -> str:
    """A table, and a warning where AP falls by more than `WARNED` points.

    config: of `codetr export`; its `compare` is the number of images, the first of the data set that it or the
    checkpoint names. out: the file that it wrote. Raises UserError where that data set cannot be read.
    """
    trust = (*application.as_names(config.trust), *filter(None, [RUNTIMES[out.suffix].runs_code]))  # we wrote it
    files = {"checkpoint": Path(config.checkpoint), config.precision: out}
    models = {name: load(path, device="cpu", trust=trust) for name, path in files.items()}
    counted = models[config.precision].about.max_detections  # type: ignore[union-attr]
    ap = {name: 100 * evaluate(_evaluation(config, path, trust, counted)) for name, path in files.items()}
    times = _milliseconds(models, _batches(config, models["checkpoint"]))
    return f"AP on {config.compare} images at most, and one image at a time:\n{table(files, ap, times)}"


def table(files: dict[str, Path], ap: dict[str, float], milliseconds: dict[str, float]) -> str:
    """A line for each file, the checkpoint first, by "checkpoint" and the precision; and the warning. ap: in points."""
    lines = [f"  {name:10}  AP {ap[name]:5.1f}  {milliseconds[name]:7.1f} ms  {path}" for name, path in files.items()]
    before, after = files
    if (lost := ap[before] - ap[after]) > WARNED:
        lines.append(f"warning: precision={after} costs {lost:.1f} points of AP; fp32 costs none")
    return "\n".join(lines)


def _evaluation(config: DictConfig, path: Path, trust: tuple[str, ...], counted: int) -> DictConfig:
    """The configuration of `codetr eval` for a file: without what it writes, one image at a time."""
    quiet = ["whereabouts", "pictures", "report", "results"]
    own = application.compose("eval", [*(f"~callbacks.{name}" for name in quiet), "trainer=cpu", "run_dir=."])
    with open_dict(own):
        own.merge_with({"checkpoint": str(path), "trust": list(trust), "weights": _weights(config, path)})
        own.data = OmegaConf.to_container(config.data) if config.get("data") else {}
        own.data.merge_with({"eval_batch_size": 1, "num_workers": 0})
        own.trainer.limit_val_batches = config.compare
        own.metrics.max_detections = min(own.metrics.max_detections, counted)
    return own


def _weights(config: DictConfig, path: Path) -> str:
    return config.weights if path == Path(config.checkpoint) else "ema"


def _batches(config: DictConfig, model: Model | Exported) -> list[Batch]:
    """A few images of the data set, one in each."""
    data = application.plain(config).get("data") or model.config["data"]
    sources = find_sources(str(data.get("val_images") or model.config["data"].get("val_images")))[:_TIMED]
    images = Images(sources, model.transform)
    items = [item for item in map(images.__getitem__, range(len(sources))) if not isinstance(item, Unreadable)]
    batches = [collate_items([item], model.size_divisor).batch for item in items]
    return [batch for batch in batches if batch is not None]


def _milliseconds(models: dict[str, Any], batches: list[Batch]) -> dict[str, float]:
    """The median time of an image, of all models in turns; the first round does not count."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(_ROUNDS + 1):
        for batch in batches:
            for name, model in models.items():
                start = time.perf_counter()
                model.detect(batch, 0.0)
                if turn:
                    times[name].append(time.perf_counter() - start)
    return {name: 1000 * median(own) for name, own in times.items()}
