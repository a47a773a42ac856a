"""What a run does when it is asked to stop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Signals:
    """Remembers a signal, so that the step is finished; a second SIGINT ends the process at once."""

    def __init__(self) -> None:
        self.received = 0

    def watch(self) -> None:
        """From now on, in place of Lightning's handlers, which take back what they replaced when the fit ends."""
        for number in SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.received == number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = number

    def agreed(self, trainer: Trainer) -> int:
        """The signal that this process, or any other, has received; 0 for none.

        Several processes wait for their devices here once per step; Lightning waits in the same place anyway.
        """
        if trainer.world_size == 1:
            return self.received
        number = torch.tensor(self.received, device=trainer.strategy.root_device)
        dist.all_reduce(number, dist.ReduceOp.MAX)
        return int(number)


def stop(trainer: Trainer, number: int, checkpoint: Path) -> None:
    """Say what was written, requeue a SLURM job that was warned (SIGUSR1), and end with status 128 + number."""
    if trainer.is_global_zero:
        name = signal.Signals(number).name
        step = trainer.global_step
        print(f"{name}: stopped after step {step}, {checkpoint} is written; go on with resume=auto", file=sys.stderr)
        if number == signal.SIGUSR1 and "SLURM_JOB_ID" in os.environ:
            _requeue()
    trainer.strategy.barrier("stopped")  # the first process to end would take the others along
    raise SystemExit(128 + number)


def _requeue() -> None:
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True)
        print(f"job {job} is in the queue again", file=sys.stderr)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"job {job} could not be put into the queue again: {error}", file=sys.stderr)
