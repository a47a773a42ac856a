"""Callbacks for tests that run `codetr.train` as a process of its own."""

from __future__ import annotations

import os
import signal
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from codetr.types import Batch


class Kill(Callback):
    """SIGKILL, as when a machine goes away, before the step with this number."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class KeepStart(Callback):
    """The weights and statistics before the first step, in the file `path`."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        torch.save(module.state_dict(), self.path)


class NoObjects(Callback):
    """The process of this rank never sees an object."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Batch, index: int) -> None:
        if trainer.global_rank == self.rank:
            batch.targets.valid.zero_()
            batch.targets.labels.zero_()


class Send(Callback):
    """A signal to the process of this rank, `times` times, while it computes the step with this number."""

    def __init__(self, number: int, step: int, rank: int = 0, times: int = 1) -> None:
        self.number, self.step, self.rank, self.times = number, step, rank, times

    def on_before_optimizer_step(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step and trainer.global_rank == self.rank:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)


class Spoil(Callback):
    """The gradient of the steps with these numbers is not finite, in the process of this rank before it is averaged.

    what: `gradient`, of one parameter, or `weight`, so that the predictions and losses are NaN for that step.
    """

    def __init__(self, steps: list[int], what: str = "gradient", rank: int = 0) -> None:
        self.steps, self.what, self.rank = steps, what, rank
        self._kept: Any = None

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        weight = next(module.detector.decoder.parameters())
        if self.what == "weight" and trainer.global_step in self.steps and trainer.global_rank == self.rank:
            self._kept = weight.detach().clone()
            weight.data.fill_(float("nan"))

    def on_after_backward(self, trainer: Trainer, module: LightningModule) -> None:
        weight = next(module.detector.decoder.parameters())
        if self._kept is not None:
            weight.data.copy_(self._kept)
            self._kept = None
        elif self.what == "gradient" and trainer.global_step in self.steps:
            assert weight.grad is not None
            weight.grad.view(-1)[0] = float("inf")


class Seen(Callback):
    """Writes the ids of the images of every batch to `file`, behind what is there; a line per batch and process."""

    def __init__(self, file: str) -> None:
        self.file = file

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Batch, index: int) -> None:
        with open(f"{self.file}.{trainer.global_rank}", "a") as stream:
            stream.write(" ".join(map(str, batch.image_ids.tolist())) + "\n")
