"""What an evaluation found, in the files that COCO's and LVIS' servers take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from codetr.data.judge import WRITTEN
from codetr.data.numbering import ids_as_text
from codetr.evaluation.results import ABSENT, FILES, results, write
from codetr.names import shown

METRICS = {"val": "bbox", "val/segm": "segm"}


class Results(Callback):
    """Process 0 writes `results_bbox.json`, and `results_segm.json` where masks were evaluated, after a validation.

    They hold what all processes found, each image once, with the image and category ids of the annotation file: judged
    by it they give the numbers of the evaluation. Detections of classes that the file does not name are left out, and
    so, of LVIS, are those of an image beyond `metrics.max_detections`. The files lie in the trainer's
    `default_root_dir`. The module's `metrics` are those of `DetectionTask`, its data a `DetectionDataModule`.
    Raises UserError when there is no room for a file.
    """

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for metric in of_decoder(pl_module).values():
            metric.keeps_columns = not trainer.sanity_checking

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        dataset, annotations = data.val_set, data.val_paths[1]
        for name, metric in of_decoder(pl_module).items():
            columns = metric.columns
            if columns is None or (name != "val" and not len(columns.ids)):
                continue
            iou_type = METRICS[name]
            path = Path(trainer.default_root_dir) / FILES[iou_type]
            names = ids_as_text(annotations, data.reader) if dataset.report.counts[WRITTEN] else {}
            limit = metric.rules.limits[-1] if metric.rules.federated else None
            count = write(path, results(columns, iou_type == "segm", dataset.category_ids, names, limit))
            images = f"{len(columns.ids)} of {len(dataset)} images"
            print(f"{count} detections in {images}: {path}{_without(dataset, annotations)}")


def of_decoder(pl_module: LightningModule) -> dict[str, Any]:
    """Those of the decoder's boxes and masks; what auxiliary heads find on their own is nobody's result."""
    return {name: metric for name, metric in pl_module.metrics.items() if name in METRICS}  # type: ignore[operator, union-attr]


def _without(dataset: Any, annotations: Path) -> str:
    pairs = zip(dataset.class_names, dataset.category_ids, strict=True)
    absent = [shown(name) for name, i in pairs if i == ABSENT]
    return f"; without {', '.join(absent)}, which {annotations} does not name" if absent else ""
