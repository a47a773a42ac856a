"""What a run costs beside its losses: time, images, memory, and how large its gradients are."""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from codetr.types import Batch

_KILO = 1 if sys.platform == "darwin" else 1024  # bytes of a unit of `ru_maxrss`


class Telemetry(Callback):
    """Logs, every `log_every_n_steps` steps, `run/hours` and `run/images` since the run began, also before it was
    resumed; `run/images_per_second` of training alone, since the last time; `run/memory_gb`, the most that the process
    has taken, on a GPU if it has one; and `train/gradient_norm` of all gradients, before they are clipped.

    Images are those of all processes.
    """

    def __init__(self) -> None:
        self.hours, self.images = 0.0, 0
        self._begun = self._mark = time.monotonic()
        self._since = self._logged = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begun = time.monotonic()
        self._logged = -1
        self._pause()

    def _pause(self) -> None:
        """Begin a new stretch of training: what lies before it is no slow training."""
        self._mark, self._since = time.monotonic(), 0

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pause()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        images = len(batch.images) * trainer.world_size
        self.images += images
        self._since += images

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        step = trainer.global_step
        if step == self._logged or step % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        self._logged = step
        gradients = [p.grad.detach() for p in pl_module.parameters() if p.grad is not None]
        norm = get_total_norm(gradients)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm  # of all processes
        if not trainer.is_global_zero:
            return
        numbers = {
            "train/gradient_norm": float(norm) / _scale(trainer, optimizer),
            "run/hours": self._hours(),
            "run/images": float(self.images),
            "run/memory_gb": _memory() / 1e9,
        }
        if self._since:
            numbers["run/images_per_second"] = self._since / max(1e-9, time.monotonic() - self._mark)
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step)
        self._pause()

    def _hours(self) -> float:
        return self.hours + (time.monotonic() - self._begun) / 3600

    def state_dict(self) -> dict[str, Any]:
        return {"hours": self._hours(), "images": self.images}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.hours, self.images = state_dict["hours"], state_dict["images"]


def _scale(trainer: Trainer, optimizer: torch.optim.Optimizer) -> float:
    """By which gradients are still multiplied: a gradient scaler's, where the optimizer divides by it itself."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    itself = getattr(optimizer, "_step_supports_amp_scaling", False)
    return scaler.get_scale() if scaler is not None and itself else 1.0


def _memory() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KILO
