"""Predictions beside ground truth, drawn from what the validation step computed anyway."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from PIL.Image import Image
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from codetr.files import atomically
from codetr.names import shown
from codetr.types import Batch, Detections, box_scale
from codetr.visualize import compare, grid

FILE = "predictions.png"


class Pictures(Callback):
    """Draws the first `count` validation images of process 0 into the loggers and into `predictions.png`.

    score_threshold: detections below it are not drawn. The module's validation step returns list[Detections], and
    its metric `val` knows the class names. The file lies in the trainer's `default_root_dir`.
    """

    def __init__(self, count: int, score_threshold: float) -> None:
        self.count, self.score_threshold = count, score_threshold
        self._pictures: list[Image] = []
        self._boxes: list[tuple[Image, dict[str, Any]]] = []

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pictures, self._boxes = [], []

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: list[Detections],  # type: ignore[override]
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.is_global_zero and not trainer.sanity_checking:
            class_names = pl_module.metrics["val"].class_names  # type: ignore[index, union-attr]
            for i in range(min(self.count - len(self._pictures), len(outputs))):
                self._pictures.append(draw(batch, i, outputs[i], class_names, self.score_threshold))
                if any(isinstance(logger, WandbLogger) for logger in trainer.loggers):
                    self._boxes.append(boxes_of(batch, i, outputs[i], class_names))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._pictures:
            with atomically(Path(trainer.default_root_dir) / FILE) as part:
                (grid(self._pictures) if len(self._pictures) > 1 else self._pictures[0]).save(part)
            for logger in trainer.loggers:
                send(logger, self._pictures, trainer.global_step)
                if isinstance(logger, WandbLogger) and self._boxes:
                    images, boxes = map(list, zip(*self._boxes, strict=True))
                    logger.log_image("val/boxes", images, step=trainer.global_step, boxes=boxes)
            self._pictures, self._boxes = [], []


def draw(batch: Batch, i: int, found: Detections, class_names: list[str], score_threshold: float) -> Image:
    """Image i of a batch as the network sees it, without its padding; boxes come in pixels of the file."""
    return compare(*_seen(batch, i, found), class_names, score_threshold)


def _seen(batch: Batch, i: int, found: Detections) -> tuple[Tensor, dict[str, Any], Detections]:
    """The image without its padding, truth and detections in its pixels."""
    frames = batch.frames.to("cpu")
    scale = box_scale(frames.scale)[i]
    height, width = (frames.file_sizes * frames.scale)[i].round().int().tolist()
    found, truth = found.to("cpu"), batch.truth[i]
    found = replace(found, boxes_xyxy=found.boxes_xyxy * scale)
    return batch.images[i, :, :height, :width], {**truth, "boxes": truth["boxes"] * scale}, found


def boxes_of(batch: Batch, i: int, found: Detections, class_names: list[str]) -> tuple[Image, dict[str, Any]]:
    """Image i of a batch, and its boxes as W&B draws them: the viewer chooses classes and scores."""
    image, truth, found = _seen(batch, i, found)
    names = {k: shown(name) for k, name in enumerate(class_names)}
    scores = [{"score": score} for score in found.scores.tolist()]
    objects: list[dict[str, float]] = [{} for _ in truth["labels"]]
    both = {
        "predictions": (found.boxes_xyxy, found.labels, scores),
        "ground_truth": (truth["boxes"], truth["labels"], objects),
    }
    return to_pil_image(image.cpu()), {
        name: {
            "box_data": [
                _wandb_box(box, label, names[label], score)
                for box, label, score in zip(boxes.tolist(), labels.tolist(), own, strict=True)
            ],
            "class_labels": names,
        }
        for name, (boxes, labels, own) in both.items()
    }


def _wandb_box(box: list[float], label: int, name: str, scores: dict[str, float]) -> dict[str, Any]:
    caption = f"{name} {scores['score']:.2f}" if scores else name
    position = dict(zip(("minX", "minY", "maxX", "maxY"), box, strict=True))
    entry = {"position": position, "domain": "pixel", "class_id": label, "box_caption": caption}
    return entry | {"scores": scores} if scores else entry


def send(logger: Logger, pictures: list[Image], step: int) -> None:
    """Hand pictures to a logger that shows them; others have nothing to show them with."""
    if isinstance(logger, TensorBoardLogger):
        for i, picture in enumerate(pictures):
            logger.experiment.add_image(f"val/predictions/{i}", np.asarray(picture), step, dataformats="HWC")
    elif isinstance(logger, WandbLogger):
        logger.log_image("val/predictions", pictures, step=step)
    elif isinstance(logger, MLFlowLogger):
        for i, picture in enumerate(pictures):
            name = f"predictions/{i}_step_{step:08d}.png"
            logger.experiment.log_image(logger.run_id, picture, artifact_file=name)
