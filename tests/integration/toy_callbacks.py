"""Callbacks for tests that run `codetr.train` as a process of its own."""

from __future__ import annotations

import os
import signal
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from codetr.types import Batch


class Kill(Callback):
    """SIGKILL, as when a machine goes away, before the step with this number."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class NoObjects(Callback):
    """The process of this rank never sees an object."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Batch, index: int) -> None:
        if trainer.global_rank == self.rank:
            batch.targets.valid.zero_()
            batch.targets.labels.zero_()


class Seen(Callback):
    """Writes the ids of the images of every batch to `file`, behind what is there; a line per batch and process."""

    def __init__(self, file: str) -> None:
        self.file = file

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Batch, index: int) -> None:
        with open(f"{self.file}.{trainer.global_rank}", "a") as stream:
            stream.write(" ".join(map(str, batch.image_ids.tolist())) + "\n")
