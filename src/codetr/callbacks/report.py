"""The result of a run: a table on the terminal, numbers and curves in files."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from rich import get_console
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from codetr.callbacks.results import of_decoder
from codetr.errors import UserError
from codetr.evaluation.engines import ABSENT
from codetr.evaluation.mean_ap import MeanAveragePrecision
from codetr.evaluation.summary import Evaluation
from codetr.files import atomically
from codetr.names import shown
from codetr.reporting import page, stored
from codetr.reporting.machine import machine
from codetr.visualize import save_learning_curves, save_precision_recall

_log = logging.getLogger(__name__)
SHOWN_CLASSES = 40  # in the table; metrics.json has them all
BAR_WIDTH = 24
BRANCH = "val/branch/"  # before the name of a head


class Report(Callback):
    """Process 0 writes `metrics.json`, `pr_curves.png`, what was found (see `codetr.reporting.stored`) and the page
    `report.html` after every validation, and `curves.png` after a fit that logged to CSV; a validation outside of a
    fit, such as the one of the best weights after it, shows its tables.

    The module's `metrics` are those of `DetectionTask`, computed; the files lie in the trainer's `default_root_dir`.
    losses, scores: names in metrics.csv to plot. about: further entries of metrics.json, such as the checkpoint that is
    evaluated. images: that are stored, and that the page is about, at most; 0: no page.
    """

    def __init__(self, losses: Sequence[str], scores: Sequence[str], about: Mapping[str, Any], images: int) -> None:
        self.losses, self.scores, self.about, self.images = losses, scores, dict(about), images

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.images and not trainer.sanity_checking:
            for metric in of_decoder(pl_module).values():
                metric.keeps_columns = True

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        every = evaluations(pl_module)
        if "val" not in every or not trainer.is_global_zero or trainer.sanity_checking:
            return
        evaluation, masks = every["val"], every.get("val/segm")
        folder = Path(trainer.default_root_dir)
        where: dict[str, Any] = {"epoch": trainer.current_epoch, "step": trainer.global_step}
        branches = {name[len(BRANCH) :]: own.numbers for name, own in every.items() if name.startswith(BRANCH)}
        if branches:
            where["branches"] = branches
        if masks is not None:
            where["segm"] = masks.numbers | {"map_per_class": masks.map_per_class}
        write_metrics(folder / "metrics.json", evaluation, where | self.about)
        save_precision_recall(evaluation.precision, evaluation.map_per_class, folder / "pr_curves.png")
        if self.images:
            try:
                self._write_page(trainer, pl_module)
            except UserError:
                raise
            except Exception:  # a page is no reason to lose a training
                _log.exception("report.html could not be written; please report this fault. The run goes on")
        if trainer.state.fn != "fit":
            get_console().print(tables(evaluation, masks))
            if branches:
                get_console().print("", branches_table(evaluation, branches))

    def _write_page(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = Path(trainer.default_root_dir)
        for metric in of_decoder(pl_module).values():
            if metric.columns is not None and ("bbox" in metric.iou_types or len(metric.columns.ids)):
                stored_of(trainer, metric, self.images).save(folder)
        for logger in trainer.loggers:
            if isinstance(logger, CSVLogger):
                logger.save()
        page.write(folder, running=trainer.state.fn == "fit")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            if isinstance(logger, CSVLogger):
                logger.save()
                log = Path(logger.log_dir) / "metrics.csv"
                if log.is_file():
                    path = Path(trainer.default_root_dir) / "curves.png"
                    save_learning_curves(log, path, self.losses, self.scores)


def evaluations(pl_module: LightningModule) -> dict[str, Evaluation]:
    """What the module's metrics found out, by their names; without those that saw no images beside others that did."""
    every = {name: own for name, metric in pl_module.metrics.items() for own in metric.evaluations.values()}  # type: ignore[operator, union-attr]
    return {name: own for name, own in every.items() if name == "val" or own.images}


def stored_of(trainer: Trainer, metric: MeanAveragePrecision, images: int) -> stored.Stored:
    """What the metric evaluated, with what the data module knows of its images."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    dataset, train_set = getattr(data, "val_set", None), getattr(data, "train_set", None)
    assert metric.columns is not None
    assert metric.class_names is not None
    about = stored.About(
        class_names=list(metric.class_names),
        limit=metric.rules.limits[-1],
        masks="segm" in metric.iou_types,
        federated=metric.rules.federated,
        images=0,
        frequency=list(metric.frequency or ()),
        train_objects=list(train_set.label_counts.values()) if train_set is not None else [],
        step=trainer.global_step,
        epoch=trainer.current_epoch,
        machine=machine(
            seed=os.environ.get("PL_GLOBAL_SEED"), precision=trainer.precision, processes=trainer.world_size
        ),
    )
    if dataset is None:
        return stored.of_columns(metric.columns, images, about, [], np.empty((0, 2)), [])
    files = [str(dataset.path(i)) for i in range(len(dataset))]
    return stored.of_columns(metric.columns, images, about, dataset.image_ids.tolist(), dataset.sizes, files)


def write_metrics(path: Path, evaluation: Evaluation, about: Mapping[str, Any]) -> None:
    """torchmetrics' keys, `map_per_class` and `objects_per_class` by name, the classes confused most, and where the
    numbers come from."""
    content = {
        **evaluation.numbers,
        "map_per_class": evaluation.map_per_class,
        "objects_per_class": evaluation.objects_per_class,
        "images": evaluation.images,
        "confused": evaluation.confused(SHOWN_CLASSES),
        **about,
    }
    with atomically(path) as part:
        part.write_text(json.dumps(content, indent=2) + "\n")


def tables(evaluation: Evaluation, masks: Evaluation | None = None) -> RenderableType:
    """COCO's twelve numbers, of boxes and of masks where those were evaluated, and AP per class, best first."""
    of_masks: list[RenderableType] = [_numbers(masks, "mask"), ""] if masks is not None else []
    return Group(_numbers(evaluation, "box"), "", *of_masks, _classes(evaluation))


def branches_table(evaluation: Evaluation, branches: Mapping[str, Mapping[str, float]]) -> Table:
    """The decoder beside each auxiliary head on its own (Co-DETR, table 11)."""
    table = Table(title="AP of every branch", title_style="bold", title_justify="left")
    table.add_column("branch")
    shown = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large")
    for name in shown:
        table.add_column(name, justify="right")
    for branch, numbers in {"decoder": evaluation.numbers, **branches}.items():
        table.add_row(branch, *(_number(numbers[name]) for name in shown))
    return table


def _numbers(evaluation: Evaluation, of: str) -> Table:
    table = Table(title=f"{of} AP and AR on {evaluation.images} images", title_style="bold", title_justify="left")
    ap = {name: value for name, value in evaluation.numbers.items() if name.startswith("map")}
    ar = {name: value for name, value in evaluation.numbers.items() if name.startswith("mar")}
    for _ in range(2):
        table.add_column("metric", style="dim")
        table.add_column("value", justify="right")
    for (left, a), (right, b) in zip_longest(ap.items(), ar.items(), fillvalue=("", ABSENT)):
        style = "bold" if left == "map" else ""
        table.add_row(left, Text(_number(a), style=style), right, _number(b) if right else "")
    return table


def _classes(evaluation: Evaluation) -> Table:
    ranked = sorted(evaluation.map_per_class.items(), key=lambda one: -one[1])
    hidden = max(0, len(ranked) - SHOWN_CLASSES)
    caption = f"{hidden} classes more in metrics.json" if hidden else None
    table = Table(title="AP per class", title_style="bold", title_justify="left", caption=caption)
    table.add_column("class", max_width=28, overflow="ellipsis", no_wrap=True)
    table.add_column("objects", justify="right", style="dim")
    table.add_column("AP", justify="right")
    table.add_column("", width=BAR_WIDTH, no_wrap=True)
    head = SHOWN_CLASSES // 2 if hidden else len(ranked)
    for i, (name, ap) in enumerate(ranked):
        if i < head or i >= len(ranked) - head:
            table.add_row(Text(shown(name)), str(evaluation.objects_per_class[name]), _number(ap), _bar(ap))
        if hidden and i == head:
            table.add_row("…", "", "", "")
    return table


def _number(value: float) -> str:
    return "–" if value == ABSENT else f"{value:.3f}"


def _bar(share: float) -> Text:
    eighths = round(max(share, 0.0) * BAR_WIDTH * 8)
    text = "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()
    return Text(text, style="green" if share >= 0.5 else "yellow" if share >= 0.25 else "red")
