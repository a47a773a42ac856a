"""What TensorBoard, Weights & Biases and MLflow show of a run with parts of their own, beyond numbers over steps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from codetr.callbacks.report import evaluations
from codetr.evaluation.columns import OUTSIDE
from codetr.evaluation.engines import ABSENT
from codetr.evaluation.summary import Evaluation
from codetr.names import shown, tags
from codetr.reporting import stored
from codetr.reporting.curves import operating
from codetr.reporting.matching import match
from codetr.visualize import confusion_figure

FINAL = "final/"  # before the numbers of the best weights
_NUMBERS = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large")
_ARTIFACTS = ("report.html", "metrics.json", "predictions.png", "pr_curves.png")
_MOST_CURVES = 20  # classes
# Regular expressions of tags, by TensorBoard's tab "custom scalars".
LAYOUT = {
    "mAP": {
        "AP, AP50, AP75": ["Multiline", [r"val/map$", r"val/map_50$", r"val/map_75$"]],
        "AP by size": ["Multiline", [r"val/map_small$", r"val/map_medium$", r"val/map_large$"]],
        "AP of classes": ["Multiline", [r"val/ap/"]],
        "AP of masks": ["Multiline", [r"val/segm/map"]],
        "AP of every head": ["Multiline", [r"val/map$", r"val/branch/[^/]+/map$"]],
    },
    "losses": {
        "all together": ["Multiline", [r"train/loss$"]],
        "main queries": ["Multiline", [r"train/main/"]],
        "other groups of queries": ["Multiline", [r"train/(?!main/|head_)[^/]+/"]],
        "auxiliary heads": ["Multiline", [r"train/head_[^/]+/"]],
    },
}


def log_configuration(logger: Logger, config: Mapping[str, Any]) -> None:
    """The configuration of a run that begins. In TensorBoard's table of hyperparameters it stands beside the numbers of
    the best weights, which are -1 until there are some."""
    if isinstance(logger, TensorBoardLogger):
        logger.log_hyperparams(dict(config), {FINAL + name: ABSENT for name in _NUMBERS})
    else:
        logger.log_hyperparams(dict(config))


class Dashboards(Callback):
    """After every validation: precision-recall curves and confusions in TensorBoard, a table of classes in W&B; when
    the best weights are evaluated after a fit, their numbers as `final/*`, and in MLflow the files of the run.

    It reads what the callback `report` has stored, and so comes after it. The module's `metrics` are those of
    `DetectionTask`.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                logger.experiment.add_custom_scalars(LAYOUT)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero or trainer.sanity_checking:
            return
        evaluation, step = evaluations(pl_module)["val"], trainer.global_step
        folder = Path(trainer.default_root_dir)
        for logger in trainer.loggers:
            if trainer.state.fn != "fit":
                _send_final(logger, evaluation, folder, step)
            elif isinstance(logger, TensorBoardLogger):
                _send_curves(logger, stored.load(folder, "bbox"), step)
                if evaluation.confusion is not None:
                    figure = confusion_figure(evaluation.confusion, list(evaluation.map_per_class))
                    logger.experiment.add_figure("val/confusion", figure, step)
            elif isinstance(logger, WandbLogger):
                rows = [
                    [shown(name), ap, evaluation.objects_per_class[name]]
                    for name, ap in evaluation.map_per_class.items()
                ]
                logger.log_table("val/classes", columns=["class", "AP", "objects"], data=rows, step=step)


def _send_final(logger: Logger, evaluation: Evaluation, folder: Path, step: int) -> None:
    final = {FINAL + name: value for name, value in evaluation.numbers.items()}
    if isinstance(logger, TensorBoardLogger | MLFlowLogger):
        logger.log_metrics(final, step)
    if isinstance(logger, WandbLogger):
        logger.experiment.summary.update(final)
    if isinstance(logger, MLFlowLogger):
        for path in (folder / name for name in _ARTIFACTS):
            if path.is_file():
                logger.experiment.log_artifact(logger.run_id, str(path))


def _send_curves(logger: TensorBoardLogger, own: stored.Stored | None, step: int) -> None:
    """At IoU 0.5, of all classes together and of the first ones, over thresholds of the score."""
    if own is None:
        return
    names = own.about.class_names
    matches = match(own.scene(), OUTSIDE)
    found = operating(matches, len(names), points=127)
    objects = np.bincount(matches.true_label[matches.counted], minlength=len(names))
    called = tags(names)
    curves = {"all classes": np.flatnonzero(objects)}
    curves |= {called[names[k]]: np.array([k]) for k in np.flatnonzero(objects)[:_MOST_CURVES].tolist()}
    for name, classes in curves.items():
        if len(classes):
            hits, false = found.hits[:, classes].sum(1), found.false[:, classes].sum(1)
            missed = objects[classes].sum() - hits
            precision = np.divide(hits, hits + false, out=np.ones(len(hits)), where=hits + false > 0)
            counts = (hits, false, np.zeros(len(hits)), missed)
            recall = hits / objects[classes].sum()
            logger.experiment.add_pr_curve_raw(f"val/pr/{name}", *counts, precision, recall, step, num_thresholds=127)
