"""Where a run was when an exception stopped it."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from codetr.errors import UserError
from codetr.types import Batch


class Whereabouts(Callback):
    """Adds a note to what is raised in a fit or a validation: epoch, step, and the images of the batch, if there is
    one."""

    def __init__(self) -> None:
        self._image_ids: Any = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        self._image_ids = batch.image_ids

    def on_train_batch_end(self, *_: Any) -> None:
        self._image_ids = None

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._image_ids = batch.image_ids

    def on_validation_batch_end(self, *_: Any) -> None:
        self._image_ids = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, UserError):
            return
        doing = "validating" if trainer.validating or trainer.sanity_checking else "training"
        exception.add_note(f"{doing}, epoch {trainer.current_epoch}, optimizer step {trainer.global_step}")
        if self._image_ids is not None:
            exception.add_note(f"images of the batch: {self._named(trainer, doing)}")

    def _named(self, trainer: Trainer, doing: str) -> str:
        try:
            ids = self._image_ids.tolist()
        except RuntimeError:  # a failed CUDA kernel leaves nothing that could be read
            return "unknown, the device does not answer"
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        dataset = data.val_set if doing == "validating" else data.train_set
        rows = {image_id: row for row, image_id in enumerate(dataset.image_ids.tolist())}
        return ", ".join(f"{i} ({dataset.path(rows[i])})" if i in rows else str(i) for i in ids)
