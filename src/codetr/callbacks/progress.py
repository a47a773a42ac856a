"""How far the training is: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar

from codetr.types import Batch

BAR_SECONDS = 1.0  # between two readings of the logged values, each of which waits for the device


def progress_bar(line_seconds: float) -> ProgressBar:
    """A bar when the output is a terminal, otherwise at most one line per `line_seconds`."""
    return BarProgress() if sys.stdout.isatty() else LineProgress(line_seconds)


class Meter:
    """Training speed of all processes, and the time left of the whole fit (with its validations).

    seconds: between two readings. clock: seconds from any origin.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds, self.clock = seconds, clock
        self.start(0)

    def start(self, batches_done: int) -> None:
        """Begin the fit, which may be the continuation of an earlier one."""
        self._begin, self._batches_before = self.clock(), batches_done
        self.pause()

    def pause(self) -> None:
        """Begin a new stretch of training, so that the validation before it does not count as slow training."""
        self._since, self._images = self.clock(), 0

    def add(self, images: int) -> None:
        self._images += images

    @property
    def due(self) -> bool:
        return self.clock() - self._since >= self.seconds

    def read(self, batches_done: int, batches_left: float) -> dict[str, str]:
        """Images per second since the last reading; time left at the mean speed since `start`."""
        now = self.clock()
        speed = self._images / max(now - self._since, 1e-9)
        seconds_per_batch = (now - self._begin) / max(batches_done - self._batches_before, 1)
        left = seconds_per_batch * batches_left
        self.pause()
        shown = str(timedelta(seconds=round(left))) if math.isfinite(left) else "?"
        return {"images/s": f"{speed:.1f}", "left": shown}


def read_trainer(trainer: Trainer, meter: Meter) -> dict[str, str]:
    """What the task logs for the progress bar, with the meter's reading."""
    logged = {name: f"{float(value):.4g}" for name, value in trainer.progress_bar_metrics.items()}
    return logged | meter.read(batches_done(trainer), batches_left(trainer))


def batches_done(trainer: Trainer) -> int:
    return trainer.fit_loop.total_batch_idx + 1


def batches_left(trainer: Trainer) -> float:
    """Of the fit on one process, from its epoch, batch and step on; infinite when nothing limits it."""
    epochs = trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs >= 0 else math.inf
    steps = trainer.max_steps if trainer.max_steps >= 0 else math.inf
    by_epochs = (epochs - trainer.current_epoch) * trainer.num_training_batches - (trainer.fit_loop.batch_idx + 1)
    return max(0, min(by_epochs, (steps - trainer.global_step) * trainer.accumulate_grad_batches))


class BarProgress(RichProgressBar):
    """Lightning's bar, reading the logged values once a second instead of at every batch."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=4)
        self.meter = Meter(BAR_SECONDS)
        self._shown: dict[str, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.meter.start(batches_done(trainer))
        super().on_train_start(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self.meter.add(len(batch.images) * trainer.world_size)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        self.meter.pause()

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        if self.meter.due:
            self._shown = read_trainer(trainer, self.meter)
        return self._shown


class LineProgress(ProgressBar):
    """One line per so many seconds, and one when an epoch or a validation ends."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.meter = Meter(seconds)
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def _line(self, where: str, batch: int, batches: float, values: dict[str, str]) -> None:
        if self._enabled:
            words = "".join(f"  {name} {value}" for name, value in values.items())
            print(f"{where}  {batch}/{batches}{words}", flush=True)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.meter.start(batches_done(trainer))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self.meter.add(len(batch.images) * trainer.world_size)
        done, total = batch_idx + 1, self.total_train_batches
        if self.meter.due or done == total:
            epoch = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
            self._line(epoch, done, total, read_trainer(trainer, self.meter))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.meter.pause()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.has_dataloader_changed(dataloader_idx)
        self.meter.add(len(batch.images) * trainer.world_size)
        done, total = batch_idx + 1, self.total_val_batches_current_dataloader
        if self.meter.due or done == total:
            where = "sanity check" if trainer.sanity_checking else "validation"
            speed = self.meter.read(done, total - done)["images/s"]
            self._line(where, done, total, {"images/s": speed})

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.meter.pause()
