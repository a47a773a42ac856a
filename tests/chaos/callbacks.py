"""Callbacks that tell where a run is, and what goes wrong in it."""

from __future__ import annotations

import os
import resource
import signal
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class Tell(Callback):
    """Process 0 writes a line `phase step` into a pipe whenever it comes to another phase or step."""

    def __init__(self, pipe: int) -> None:
        self.pipe = pipe

    def _tell(self, trainer: Trainer, phase: str) -> None:
        if trainer.is_global_zero and trainer.state.fn == "fit":
            os.write(self.pipe, f"{phase} {trainer.global_step}\n".encode())

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self._tell(trainer, "training")

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self._tell(trainer, "training")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._tell(trainer, "validation")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._tell(trainer, "training")

    def on_save_checkpoint(self, trainer: Trainer, *_: Any) -> None:
        self._tell(trainer, "writing")


class KillEveryAttempt(Callback):
    """Under torchrun: SIGKILL of a worker before step `steps[i]` of attempt i, in turn of the first and the last."""

    def __init__(self, steps: list[int]) -> None:
        self.steps, self.attempt = steps, int(os.environ["TORCHELASTIC_RESTART_COUNT"])

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        due = self.attempt < len(self.steps) and trainer.global_step == self.steps[self.attempt]
        if due and trainer.global_rank == (self.attempt % 2) * (trainer.world_size - 1):
            os.kill(os.getpid(), signal.SIGKILL)


class FullDisk(Callback):
    """From `step` on, files end after so many bytes: what writes further gets an OSError."""

    def __init__(self, step: int, size: int) -> None:
        self.step, self.size = step, size

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.size))


class Poison(Callback):
    """The gradient of one parameter is not a number at `step`."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == self.step:
            gradient = next(p.grad for p in pl_module.parameters() if p.grad is not None)
            gradient.fill_(torch.nan)
