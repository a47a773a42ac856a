"""Validation as Lightning calls it: detections of every batch into metrics, whatever they come from."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial

from lightning.pytorch import LightningModule

from codetr.evaluation.inputs import inputs
from codetr.evaluation.mean_ap import MeanAveragePrecision
from codetr.names import tags
from codetr.types import Batch, Detections
from codetr.views import Eye, Found, Pixels, Views, through


class Validation(LightningModule):
    """metrics: by the names under which their numbers are logged, "val" among them, and "val/segm" of masks; further
    ones may join. views: by which images are looked at, see `codetr.views`; none: as they come in batches."""

    def __init__(self, metrics: dict[str, MeanAveragePrecision], views: Sequence[Views] = ()) -> None:
        super().__init__()
        self.metrics, self.views = metrics, tuple(views)

    @abstractmethod
    def find(self, batch: Batch, masks: bool) -> list[Found]:
        """What is found in each image of a batch, in pixels of its file, by the names of `metrics`. masks: with masks,
        where it finds some."""

    def setup(self, stage: str) -> None:
        if self.views:
            self.trainer.datamodule.val_pixels = True  # type: ignore[attr-defined]

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

    def validation_step(self, batch: Batch, batch_idx: int) -> list[Detections]:  # type: ignore[override]
        masks = "val/segm" in self.metrics and all("rle" in truth for truth in batch.truth)
        found = self._look(batch, masks)
        for name in found[0]:
            self.evaluate(name, [one[name] for one in found], batch)
        boxes = [one["val"] for one in found]
        if masks:
            self.evaluate("val/segm", boxes, batch)
        return boxes

    def _look(self, batch: Batch, masks: bool) -> list[Found]:
        if not self.views:
            return self.find(batch, masks)
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        eye = Eye(partial(self.find, masks=masks), data.val_transform, data.size_divisor, batch.images.device)
        return through(self.views, eye)([Pixels(pixels) for pixels in batch.pixels])

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
    views: see `Validation`.
    """

    def __init__(
        self,
        detect: Callable[[Batch], list[Detections]],
        metrics: MeanAveragePrecision,
        masks: MeanAveragePrecision | None,
        views: Sequence[Views] = (),
    ) -> None:
        super().__init__({"val": metrics} | ({} if masks is None else {"val/segm": masks}), views)
        self.detect = detect

    def find(self, batch: Batch, masks: bool) -> list[Found]:
        return [{"val": one} for one in self.detect(batch)]
