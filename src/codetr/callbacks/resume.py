"""Checkpoints from which a killed run goes on exactly where it was."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers.csv_logs import CSVLogger, ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only

BEST, LAST = "best.ckpt", "last.ckpt"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the file and renames: at every moment the file is the old or the new checkpoint."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".part")
        with temporary.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)


class Checkpoints(Checkpoint):
    """`last.ckpt` every `every_n_steps` optimizer steps and after every epoch, `best.ckpt` at the best `monitor`.

    every_n_steps: 0 for epochs only. monitor: a logged number, more is better. Loggers are flushed first, so that
    no logged line older than the checkpoint is lost with the process.
    """

    def __init__(self, directory: str, monitor: str, every_n_steps: int) -> None:
        self.directory, self.monitor, self.every_n_steps = Path(directory), monitor, every_n_steps
        self.best_score: float | None = None
        self._step = 0

    @property
    def best_model_path(self) -> str:
        """Where Lightning looks for the best checkpoint; "" before there is one."""
        return "" if self.best_score is None else str(self.directory / BEST)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stepped = trainer.global_step != self._step
        self._step = trainer.global_step
        due = self.every_n_steps and trainer.global_step % self.every_n_steps == 0
        ends = trainer.global_step == trainer.max_steps
        # A resumed run would skip the validation that follows this batch, and so would never log it.
        due = due and not _validation_follows(trainer, batch_idx)
        if stepped and (due or (ends and not trainer.is_last_batch)):
            self._save(trainer, LAST)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        score = trainer.callback_metrics.get(self.monitor)
        if trainer.sanity_checking or trainer.state.fn != "fit" or score is None:
            return
        if self.best_score is None or float(score) > self.best_score:
            self.best_score = float(score)
            self._save(trainer, BEST)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_last_batch:  # else `max_steps` ends it within an epoch, which for Lightning then is over
            self._save(trainer, LAST)

    def _save(self, trainer: Trainer, name: str) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        for logger in trainer.loggers:
            logger.save()
        trainer.save_checkpoint(self.directory / name, weights_only=False)

    def state_dict(self) -> dict[str, Any]:
        return {"best_score": self.best_score}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_score = state_dict["best_score"]


def _validation_follows(trainer: Trainer, batch_idx: int) -> bool:
    if trainer.is_last_batch:
        return True
    every = trainer.val_check_batch
    done = trainer.fit_loop.total_batch_idx if trainer.check_val_every_n_epoch is None else batch_idx
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
        temporary = path.with_name(path.name + ".part")
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.metrics_keys)
            writer.writeheader()
            writer.writerows(rows)
        temporary.replace(path)
