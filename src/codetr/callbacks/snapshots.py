"""Small checkpoints on the way, for what is drawn against training steps (`codetr analyse`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor
from torch.distributed.tensor import DTensor

from codetr.callbacks.ema import EMA
from codetr.checkpoint import PREFIX
from codetr.files import atomically

LARGEST = torch.finfo(torch.float16).max


class Snapshots(Checkpoint):
    """Keeps the detector's weights before the first step and every `every_n_steps` optimizer steps, all of them, in
    `directory`/step_<number>.ckpt.

    weights: `raw`, those of the step, or `ema`, the averaged ones, where there are some. half: as float16, except for
    tensors with numbers beyond its range: a sixth of a checkpoint from which training goes on. `codetr.load` opens the
    files, in float32. Raises UserError when there is no room for one.
    """

    def __init__(self, directory: str, every_n_steps: int, weights: Literal["raw", "ema"], half: bool) -> None:
        self.directory, self.every_n_steps = Path(directory), every_n_steps
        self.weights, self.half = weights, half
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step
        if self._step == 0:
            self._keep(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == self._step:  # gradients are still being accumulated
            return
        self._step = trainer.global_step
        if self._step % self.every_n_steps == 0:
            self._keep(trainer, pl_module)

    def _keep(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        state = trainer.strategy.lightning_module_state_dict()  # of all processes, where weights are shards
        if self.weights == "ema":
            state |= {f"{PREFIX}{name}": whole(value) for name, value in _average(trainer).items()}
        if not trainer.is_global_zero:
            return
        weights = {name: self._stored(value) for name, value in state.items() if name.startswith(PREFIX)}
        content: dict[str, Any] = {"state_dict": weights, "global_step": self._step}
        pl_module.on_save_checkpoint(content)  # what it says about its model
        with atomically(self.directory / f"step_{self._step:08d}.ckpt") as part:
            torch.save(content, part)

    def _stored(self, value: Tensor) -> Tensor:
        value = value.detach().cpu()
        if not self.half or value.dtype != torch.float32 or (value.numel() and value.abs().max() > LARGEST):
            return value.clone()
        return value.half()


def _average(trainer: Trainer) -> dict[str, Tensor]:
    return next((own.average for own in trainer.callbacks if isinstance(own, EMA)), {})  # type: ignore[attr-defined]


def whole(value: Tensor) -> Tensor:
    """A tensor whose shards the processes hold together; others as they are."""
    return value.full_tensor() if isinstance(value, DTensor) else value
