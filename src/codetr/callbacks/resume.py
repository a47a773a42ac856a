"""Checkpoints from which a killed run goes on exactly where it was."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers.csv_logs import CSVLogger, ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.nn.utils import get_total_norm

from codetr.callbacks.signals import Signals, stop
from codetr.checkpoint import generation
from codetr.errors import UserError
from codetr.files import atomically

BEST, LAST = "best.ckpt", "last.ckpt"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the file and renames: at every moment the file is the old or the new checkpoint, and whole.

    storage_options: how many generations to keep, this one included (see `codetr.checkpoint.generation`). Raises
    UserError when there is no room, or when a tensor is not finite: such a checkpoint is not written.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        path = Path(path)
        tensors = named_tensors(checkpoint)
        if bad := names_not_finite(tensors):
            raise UserError(
                f"{path} is not written, and stays as it was: {len(bad)} of {len(tensors)} tensors are not finite at "
                f"step {checkpoint.get('global_step')}, such as {bad[0]}; go on from it (resume=auto) with a lower "
                "optimizer.lr or trainer.precision=32-true"
            )
        with atomically(path, sum(tensor.nbytes for tensor in tensors.values())) as part:
            with part.open("wb") as file:
                torch.save(checkpoint, file)
            _make_older(path, storage_options or 1)


def _make_older(path: Path, keep: int) -> None:
    """Each generation takes the place of the one before; the newest keeps its name too, until it is replaced."""
    for age in reversed(range(keep - 1)):
        source, target = generation(path, age), generation(path, age + 1)
        if not source.exists():
            continue
        if age:
            source.replace(target)
            continue
        target.unlink(missing_ok=True)
        try:
            os.link(source, target)
        except OSError:  # a file system without hard links
            source.replace(target)


def named_tensors(value: Any, name: str = "") -> dict[str, Tensor]:
    """Every tensor in nested containers."""
    if isinstance(value, Tensor):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    return {k: tensor for key, child in items for k, tensor in named_tensors(child, f"{name}/{key}".strip("/")).items()}


def names_not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """One reduction over all; where the norm is not finite, which large numbers do too, one by one."""
    floating = {name: t.detach() for name, t in tensors.items() if t.is_floating_point()}
    if get_total_norm(list(floating.values())).isfinite():
        return []
    return [name for name, tensor in floating.items() if not tensor.isfinite().all()]


class Checkpoints(Checkpoint):
    """`last.ckpt` every `every_n_steps` optimizer steps and after every epoch, `best.ckpt` at the best `monitor`.

    every_n_steps: 0 for epochs only. monitor: a logged number, more is better. keep: generations of `last.ckpt`.
    Loggers are flushed first, so that no logged line older than the checkpoint is lost with the process.

    On SIGTERM, SIGINT or SIGUSR1 to any process the step is finished, `last.ckpt` written, and the run ends with
    status 128 + signal. Where a validation follows the step, `last.ckpt` is written after it: a run resumed from before
    it would skip it. Raises UserError, in all processes, when a checkpoint cannot be written: a run that went on could
    lose everything from there.
    """

    def __init__(self, directory: str, monitor: str, every_n_steps: int, keep: int) -> None:
        self.directory, self.monitor = Path(directory), monitor
        self.every_n_steps, self.keep = every_n_steps, keep
        self.best_score: float | None = None
        self._signals = Signals()
        self._step = 0
        self._after_validation = False

    @property
    def best_model_path(self) -> str:
        """Where Lightning looks for the best checkpoint; "" before there is one."""
        return "" if self.best_score is None else str(self.directory / BEST)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step
        self._signals.watch()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:  # gradients are being accumulated, which no checkpoint holds
            return
        self._step = trainer.global_step
        due = self.every_n_steps and self._step % self.every_n_steps == 0
        ends = self._step == trainer.max_steps
        if not (self._signals.agreed(trainer) or due or ends) or trainer.is_last_batch:  # the end of the epoch saves
            return
        if _validation_follows(trainer, batch_idx) and not ends:
            self._after_validation = True
        else:
            self._save_last(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        score = trainer.callback_metrics.get(self.monitor)
        if score is not None and (self.best_score is None or float(score) > self.best_score):
            self.best_score = float(score)
            self._save(trainer, BEST, 1)
        if self._after_validation:
            self._after_validation = False
            self._save_last(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_last_batch:  # else `max_steps` ends it within an epoch, which for Lightning then is over
            self._save_last(trainer)

    def _save_last(self, trainer: Trainer) -> None:
        self._save(trainer, LAST, self.keep)
        if number := self._signals.agreed(trainer):
            stop(trainer, number, self.directory / LAST)

    def _save(self, trainer: Trainer, name: str, keep: int) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        for logger in trainer.loggers:
            logger.save()
        failure = ""
        try:
            trainer.save_checkpoint(self.directory / name, weights_only=False, storage_options=keep)
        except UserError as error:  # in the process that writes: the others wait for it
            failure = str(error)
            trainer.strategy.barrier("Trainer.save_checkpoint")
        if failure := trainer.strategy.broadcast(failure):
            raise UserError(failure)

    def state_dict(self) -> dict[str, Any]:
        return {"best_score": self.best_score}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_score = state_dict["best_score"]


def _validation_follows(trainer: Trainer, batch_idx: int) -> bool:
    every, epochs = trainer.val_check_batch, trainer.check_val_every_n_epoch
    if not trainer.enable_validation or (epochs and (trainer.current_epoch + 1) % epochs):
        return False
    done = trainer.fit_loop.total_batch_idx if epochs is None else batch_idx
    return every is not None and (done + 1) % every == 0


class ContinuedCSVLogger(CSVLogger):
    """`directory/metrics.csv`, kept by a resumed run: lines of steps that it repeats (>= resumed_step) go.

    resumed_step: None for a fresh run.
    """

    def __init__(self, directory: str, flush_logs_every_n_steps: int, resumed_step: int | None) -> None:
        super().__init__(directory, name="", version="", flush_logs_every_n_steps=flush_logs_every_n_steps)
        self.resumed_step = resumed_step

    @property
    def experiment(self) -> ExperimentWriter:
        if self._experiment is None and rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            self._experiment = _ContinuedWriter(self.log_dir, self.resumed_step or 0)
            return self._experiment
        return super().experiment


class _ContinuedWriter(ExperimentWriter):
    def __init__(self, log_dir: str, step: int) -> None:
        self._kept_below = step
        super().__init__(log_dir)

    def _check_log_dir_exists(self) -> None:
        """In Lightning this deletes an existing file."""
        path = Path(self.metrics_file_path)
        if not path.exists():
            return
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            rows = [row for row in reader if int(row["step"]) < self._kept_below]
            keys = list(reader.fieldnames or [])
        if not rows:
            path.unlink()
            return
        self.metrics_keys = keys
        with atomically(path) as part, part.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.metrics_keys)
            writer.writeheader()
            writer.writerows(rows)
