"""Validation as Lightning calls it: detections of every batch into metrics, whatever they come from."""

from __future__ import annotations

from collections.abc import Callable

from lightning.pytorch import LightningModule

from codetr.evaluation.inputs import inputs
from codetr.evaluation.mean_ap import MeanAveragePrecision
from codetr.names import tags
from codetr.types import Batch, Detections


class Validation(LightningModule):
    """metrics: by the names under which their numbers are logged, "val" among them; further ones may join."""

    def __init__(self, metrics: dict[str, MeanAveragePrecision]) -> None:
        super().__init__()
        self.metrics = metrics

    @property
    def counted(self) -> int:
        """Detections of an image that metrics count."""
        return self.metrics["val"].rules.limits[-1]

    def on_validation_epoch_start(self) -> None:
        for metric in self.metrics.values():
            metric.reset()
            metric.update([], [])  # a data set may have no masks: torchmetrics warns of a metric that saw no batch
            if metric.rules.federated:
                metric.frequency = self.trainer.datamodule.val_set.frequencies  # type: ignore[attr-defined]

    def evaluate(self, name: str, detections: list[Detections], batch: Batch) -> None:
        self.metrics[name].update(*inputs(batch.image_ids, detections, batch.truth, masks=name == "val/segm"))

    def on_validation_epoch_end(self) -> None:
        numbers: dict[str, float] = {}
        for name, metric in self.metrics.items():
            metric.compute()
            (evaluation,) = metric.evaluations.values()
            if name == "val" or evaluation.images:
                numbers |= {f"{name}/{key}": value for key, value in evaluation.numbers.items()}
        classes = self.metrics["val"].evaluations["bbox"].map_per_class
        called = tags(classes)
        numbers |= {f"val/ap/{called[name]}": value for name, value in classes.items()}
        # The evaluation after a fit is no point of its curves.
        fitting = self.trainer.state.fn == "fit"
        self.log("val/map", numbers.pop("val/map"), prog_bar=True, logger=fitting)
        self.log_dict(numbers, logger=fitting)


class Validated(Validation):
    """Evaluates whatever finds objects in batches.

    detect: a batch -> detections in pixels of the files.
    masks: metrics of masks, where it finds some.
    """

    def __init__(
        self,
        detect: Callable[[Batch], list[Detections]],
        metrics: MeanAveragePrecision,
        masks: MeanAveragePrecision | None,
    ) -> None:
        super().__init__({"val": metrics} | ({} if masks is None else {"val/segm": masks}))
        self.detect = detect

    def validation_step(self, batch: Batch, batch_idx: int) -> list[Detections]:  # type: ignore[override]
        detections = self.detect(batch)
        self.evaluate("val", detections, batch)
        if "val/segm" in self.metrics and all("rle" in truth for truth in batch.truth):
            self.evaluate("val/segm", detections, batch)
        return detections
